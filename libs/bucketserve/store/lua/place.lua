#!lua flags=allow-oom
-- Notes that a ticket is at a worker, wherever it was before.
-- KEYS: epoch, ticket, waiting, place.  ARGV: epoch, id, worker id, batch id.
-- Returns the id if there is such a ticket; error STALE.  O(log n).
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('STALE epoch') end
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then return {} end
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('HSET', KEYS[4], ARGV[2], ARGV[3] .. '\n' .. ARGV[4])
return {ARGV[2]}
