-- Renews a runner's leases; a job whose requests run does not expire.
-- KEYS: meta, item, pending, lease, owner, result.  ARGV: owner, lease in milliseconds, indices...
-- Returns the indices that are still the runner's; none if the job does not run any more.  O(k log n).
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return {} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local kept = {}
for i = 3, #ARGV do
  if redis.call('HGET', KEYS[5], ARGV[i]) == ARGV[1] then
    redis.call('ZADD', KEYS[4], now + ARGV[2], ARGV[i])
    kept[#kept + 1] = tonumber(ARGV[i])
  end
end
if #kept > 0 then
  local ttl = redis.call('HGET', KEYS[1], 'ttl')
  for i = 1, 6 do redis.call('EXPIRE', KEYS[i], ttl) end
end
return kept
