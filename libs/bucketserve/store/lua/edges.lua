#!lua flags=allow-oom
-- Replaces the bucket edges. A ticket's bucket follows from its length, so nothing else has to move.
-- KEYS: epoch, edges.  ARGV: epoch, edges joined by commas.  Returns 1; error STALE.  O(1).
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('STALE epoch') end
redis.call('SET', KEYS[2], ARGV[2])
return 1
