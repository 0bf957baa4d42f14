-- Keeps a submission's room for longer, or gives it up.
-- KEYS: room, until, held as for job_reserve.  ARGV: submission, seconds to keep it from now; 0: given up.  O(log n).
local bytes, tenant = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%d+) (.*)$')
if not bytes then return 0 end
if tonumber(ARGV[2]) > 0 then
  local time = redis.call('TIME')
  redis.call('ZADD', KEYS[2], time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2] * 1000, ARGV[1])
  local last = tonumber(redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2])
  for i = 1, 3 do redis.call('PEXPIREAT', KEYS[i], last) end
  return 1
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HINCRBY', KEYS[3], tenant, -bytes) <= 0 then redis.call('HDEL', KEYS[3], tenant) end
if redis.call('HINCRBY', KEYS[3], '', -bytes) <= 0 then redis.call('HDEL', KEYS[3], '') end
return 1
