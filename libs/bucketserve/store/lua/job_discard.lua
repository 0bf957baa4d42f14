-- Takes results out of a job that has ended.
-- KEYS: meta, result.  ARGV: kind of result, indices...  O(k).
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'gone:' .. ARGV[1], 1)
for i = 2, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
return 1
