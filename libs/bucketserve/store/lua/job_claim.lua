-- Gives requests of a job to a runner, those first whose runner let its lease run out.
-- KEYS: meta, item, pending, lease, owner, result.  ARGV: owner, most requests, lease in milliseconds.
-- Returns their indices; none unless the job is running.  O((k + e) log n) for k given and e expired.
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return {} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, index in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, 1000)) do
  redis.call('ZREM', KEYS[4], index)
  redis.call('HDEL', KEYS[5], index)
  redis.call('ZADD', KEYS[3], index, index)
end
local taken = redis.call('ZPOPMIN', KEYS[3], ARGV[2])
local given = {}
for i = 1, #taken, 2 do
  redis.call('ZADD', KEYS[4], now + ARGV[3], taken[i])
  redis.call('HSET', KEYS[5], taken[i], ARGV[1])
  given[#given + 1] = tonumber(taken[i])
end
if #given > 0 then
  -- Also for keys that are new, or were empty and are new again: without it they would stay for ever.
  local ttl = redis.call('HGET', KEYS[1], 'ttl')
  for i = 1, 6 do redis.call('EXPIRE', KEYS[i], ttl) end
end
return given
