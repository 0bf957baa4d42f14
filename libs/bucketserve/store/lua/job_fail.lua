-- Ends a batch that is loading: nothing of it runs.
-- KEYS: meta.  ARGV: note.  O(1).
if redis.call('HGET', KEYS[1], 'state') ~= 'loading' then return 0 end
local time = redis.call('TIME')
local now = string.format('%d', time[1] * 1000000 + time[2])
redis.call('HSET', KEYS[1], 'state', 'failed', 'note', ARGV[1], 'ended', now)
redis.call('EXPIRE', KEYS[1], redis.call('HGET', KEYS[1], 'ttl'))
return 1
