-- Stores requests of a submission while its job is loading.
-- KEYS: meta, upload.  ARGV: seconds for loading, index of the first, requests...
-- Returns 1 if they were stored, 0 if the job is not loading any more, -1 if it is gone.  O(k).
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return -1 end
if state ~= 'loading' then return 0 end
for i = 3, #ARGV do redis.call('HSET', KEYS[2], ARGV[2] + i - 3, ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[1])
return 1
