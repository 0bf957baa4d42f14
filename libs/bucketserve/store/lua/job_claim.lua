-- Gives requests of a job to a runner, those first whose runner let its lease run out.
-- KEYS: meta, item, pending, lease, owner, result, lost.
-- ARGV: owner, most requests, lease in milliseconds, most bytes of all requests but the first.
-- Returns their indices; none unless the job is running.  O((k + e) log n) for k given and e expired, O(n log n) once
-- after a loss.
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return {} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- Leases that end later than any could were given before the server's clock was set back.
local latest = now + 2 * ARGV[3]
for _, index in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '(' .. latest, '+inf', 'LIMIT', 0, 1000)) do
  redis.call('ZADD', KEYS[4], now + ARGV[3], index)
end
for _, index in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, 1000)) do
  redis.call('ZREM', KEYS[4], index)
  redis.call('HDEL', KEYS[5], index)
  redis.call('ZADD', KEYS[3], index, index)
  redis.call('HINCRBY', KEYS[7], index, 1)
end
if redis.call('EXISTS', KEYS[3], KEYS[4]) == 0 then
  -- Of a job that runs some requests wait or are at a runner: who has them was lost, evicted.
  for i = 0, redis.call('HGET', KEYS[1], 'total') - 1 do
    if redis.call('HEXISTS', KEYS[6], i) == 0 then
      redis.call('HDEL', KEYS[5], i)
      redis.call('ZADD', KEYS[3], i, i)
    end
  end
end
local given, left = {}, tonumber(ARGV[4])
while #given < tonumber(ARGV[2]) do
  local index = redis.call('ZRANGE', KEYS[3], 0, 0)[1]
  if not index then break end
  left = left - redis.call('HSTRLEN', KEYS[2], index)
  if left < 0 and #given > 0 then break end
  redis.call('ZREM', KEYS[3], index)
  redis.call('ZADD', KEYS[4], now + ARGV[3], index)
  redis.call('HSET', KEYS[5], index, ARGV[1])
  given[#given + 1] = tonumber(index)
end
if #given > 0 then
  -- Also for keys that are new, or were empty and are new again: without it they would stay for ever.
  local ttl = redis.call('HGET', KEYS[1], 'ttl')
  for i = 1, 7 do redis.call('EXPIRE', KEYS[i], ttl) end
end
return given
