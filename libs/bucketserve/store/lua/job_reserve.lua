-- Takes room for what a submission stores, within what its tenant and everybody may have.
-- KEYS: room (hash: submission -> bytes, a space, tenant), until (zset: submission -> end in ms), held (hash: tenant or
-- empty for all -> bytes).
-- ARGV: submission, tenant (never empty), bytes more, seconds to keep it, most of a tenant, most of all.
-- Returns 1, or without effect 0 if the tenant has too much, -1 if all have.  O(log n), what has expired,
-- and O(n log n) once after a loss.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, ended in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 1000)) do
  local bytes, tenant = string.match(redis.call('HGET', KEYS[1], ended) or '0 ', '^(%d+) (.*)$')
  if redis.call('HINCRBY', KEYS[3], tenant, -bytes) <= 0 then redis.call('HDEL', KEYS[3], tenant) end
  if redis.call('HINCRBY', KEYS[3], '', -bytes) <= 0 then redis.call('HDEL', KEYS[3], '') end
  redis.call('HDEL', KEYS[1], ended)
  redis.call('ZREM', KEYS[2], ended)
end
if redis.call('HLEN', KEYS[1]) ~= redis.call('ZCARD', KEYS[2])
  or redis.call('EXISTS', KEYS[1]) ~= redis.call('EXISTS', KEYS[3]) then
  -- A part was lost, evicted: what is held is what submissions have that are known, or it would be held for ever.
  redis.call('DEL', KEYS[3])
  for _, name in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    if redis.call('HEXISTS', KEYS[1], name) == 0 then redis.call('ZREM', KEYS[2], name) end
  end
  local rooms = redis.call('HGETALL', KEYS[1])
  for i = 1, #rooms, 2 do
    local bytes, tenant = string.match(rooms[i + 1], '^(%d+) (.*)$')
    redis.call('ZADD', KEYS[2], 'NX', now + ARGV[4] * 1000, rooms[i])
    redis.call('HINCRBY', KEYS[3], tenant, bytes)
    redis.call('HINCRBY', KEYS[3], '', bytes)
  end
end
local of_tenant = tonumber(redis.call('HGET', KEYS[3], ARGV[2]) or 0)
local of_all = tonumber(redis.call('HGET', KEYS[3], '') or 0)
local more = tonumber(ARGV[3])
if more > 0 and of_tenant + more > tonumber(ARGV[5]) then return 0 end
if more > 0 and of_all + more > tonumber(ARGV[6]) then return -1 end
local had = tonumber(string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '0 ', '^%d+'))
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d %s', had + more, ARGV[2]))
redis.call('HINCRBY', KEYS[3], ARGV[2], more)
redis.call('HINCRBY', KEYS[3], '', more)
redis.call('ZADD', KEYS[2], now + ARGV[4] * 1000, ARGV[1])
local last = tonumber(redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2])
for i = 1, 3 do redis.call('PEXPIREAT', KEYS[i], last) end
return 1
