#!lua flags=allow-oom
-- Notes that waiting tickets are at a worker. Works in a full server: what is dispatched will be removed.
-- KEYS: epoch, ticket, waiting, place.  ARGV: epoch, worker id, batch id, ids...
-- Returns the ids that are now in this batch, also if an earlier call of the same did it, none whose ticket is gone;
-- error STALE.
-- O(k log n).
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('STALE epoch') end
local place = ARGV[2] .. '\n' .. ARGV[3]
local done = {}
for i = 4, #ARGV do
  if redis.call('HEXISTS', KEYS[2], ARGV[i]) == 1 then
    if redis.call('ZREM', KEYS[3], ARGV[i]) == 1 then redis.call('HSET', KEYS[4], ARGV[i], place) end
    if redis.call('HGET', KEYS[4], ARGV[i]) == place then done[#done + 1] = ARGV[i] end
  end
end
return done
