#!lua flags=allow-oom
-- Gives up the leadership if the caller holds it.
-- KEYS: leader, epoch.  ARGV: owner, epoch.  Returns 1 if it was held.  O(1).
if redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('HGET', KEYS[2], 'epoch') == ARGV[2] then
  redis.call('DEL', KEYS[1])
  return 1
end
return 0
