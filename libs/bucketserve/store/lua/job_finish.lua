-- Stores a result, once, from whoever holds the request now.
-- KEYS: meta, item, pending, lease, owner, result, lost.
-- ARGV: owner, index, result, 1 if it is an error, bytes of the result.
-- Returns 1 if it was stored.  O(log n), and with the last one O(n).
if redis.call('HGET', KEYS[5], ARGV[2]) ~= ARGV[1] then return 0 end
redis.call('ZREM', KEYS[4], ARGV[2])
redis.call('HDEL', KEYS[5], ARGV[2])
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return 0 end
redis.call('HDEL', KEYS[7], ARGV[2])
redis.call('HSET', KEYS[6], ARGV[2], ARGV[3])
redis.call('HINCRBY', KEYS[1], ARGV[4] == '1' and 'bytes:failed' or 'bytes:done', ARGV[5])
if ARGV[4] == '1' then redis.call('HINCRBY', KEYS[1], 'failed', 1) end
if redis.call('HINCRBY', KEYS[1], 'done', 1) == tonumber(redis.call('HGET', KEYS[1], 'total')) then
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'state', 'completed', 'ended', string.format('%d', time[1] * 1000000 + time[2]))
  redis.call('UNLINK', KEYS[2])
end
local ttl = redis.call('HGET', KEYS[1], 'ttl')
for i = 1, 7 do redis.call('EXPIRE', KEYS[i], ttl) end
return 1
