#!lua
-- Adds a waiting ticket, unless it is at a worker: a repetition whose first try was thought lost may come at any time.
-- A place whose ticket is gone, evicted, is nothing: who admits it anew knows of no worker that has it.
-- KEYS: epoch, ticket, waiting, place.  ARGV: epoch, id, prefill length, ticket.
-- Returns 1; errors STALE, and OOM if the server's memory is full.  O(log n).
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('STALE epoch') end
if redis.call('HEXISTS', KEYS[4], ARGV[2]) == 0 or redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
  redis.call('HDEL', KEYS[4], ARGV[2])
  redis.call('HSET', KEYS[2], ARGV[2], ARGV[4])
  redis.call('ZADD', KEYS[3], ARGV[3], ARGV[2])
end
return 1
