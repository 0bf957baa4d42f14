-- Makes room for a job, unless there is one of that id; one that is loading has more time again.
-- KEYS: meta.  ARGV: seconds for loading, field, value, field, value, ...  O(1).
local state = redis.call('HGET', KEYS[1], 'state')
if not state then redis.call('HSET', KEYS[1], 'state', 'loading', unpack(ARGV, 2)) end
if not state or state == 'loading' then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
return 1
