#!lua flags=allow-oom
-- Forgets tickets, waiting or at a worker. Works in a full server.
-- KEYS: epoch, ticket, waiting, place.  ARGV: epoch, ids...
-- Returns the ids that were there; error STALE.  O(k log n).
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('STALE epoch') end
local removed = {}
for i = 2, #ARGV do
  if redis.call('HDEL', KEYS[2], ARGV[i]) == 1 then removed[#removed + 1] = ARGV[i] end
  redis.call('ZREM', KEYS[3], ARGV[i])
  redis.call('HDEL', KEYS[4], ARGV[i])
end
return removed
