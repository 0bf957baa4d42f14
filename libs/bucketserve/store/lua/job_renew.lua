-- Renews a runner's leases; a job whose requests run does not expire. What the runner has lost by silence, not by its
-- end, is not held against the request.
-- KEYS: meta, item, pending, lease, owner, result, lost.  ARGV: owner, lease in milliseconds, indices...
-- Returns the indices that are still the runner's; none if the job does not run any more.  O(k log n).
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return {} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local kept = {}
for i = 3, #ARGV do
  if redis.call('HGET', KEYS[5], ARGV[i]) == ARGV[1] then
    redis.call('ZADD', KEYS[4], now + ARGV[2], ARGV[i])
    kept[#kept + 1] = tonumber(ARGV[i])
  elseif tonumber(redis.call('HGET', KEYS[7], ARGV[i]) or 0) > 0 then
    redis.call('HINCRBY', KEYS[7], ARGV[i], -1)
  end
end
if #kept > 0 then
  local ttl = redis.call('HGET', KEYS[1], 'ttl')
  for i = 1, 7 do redis.call('EXPIRE', KEYS[i], ttl) end
end
return kept
