-- Adds a waiting record; the same attempt again changes nothing, a newer one replaces it, an older one is ignored.
-- KEYS: epoch, record, waiting, claim.  ARGV: epoch, id, attempt, prefill length, payload.
-- Returns 1 if the record is now the stored one, 0 if a newer one is; error STALE.  O(log n).
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('STALE epoch') end
local stored = redis.call('HGET', KEYS[2], ARGV[2])
if stored then
  local attempt = tonumber(string.match(stored, '^(%d+):'))
  if attempt > tonumber(ARGV[3]) then return 0 end
  if attempt == tonumber(ARGV[3]) then return 1 end
  redis.call('HDEL', KEYS[4], ARGV[2])
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3] .. ':' .. ARGV[5])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[2])
return 1
