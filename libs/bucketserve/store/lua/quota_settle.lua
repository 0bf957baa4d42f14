#!lua flags=allow-oom
-- Ends a request of a tenant and gives back what it did not use.
-- KEYS: tokens, running.  ARGV: name, how much sooner all will have come back (seconds).  O(log n).
local tokens = string.match(ARGV[1], '^(%d+):')
if redis.call('ZREM', KEYS[2], ARGV[1]) == 1 and tokens then
  if tonumber(redis.call('ZINCRBY', KEYS[2], tokens, '')) >= 0 then redis.call('ZREM', KEYS[2], '') end
end
local level = redis.call('GET', KEYS[1])
if level then redis.call('SET', KEYS[1], string.format('%.6f', level - ARGV[2]), 'KEEPTTL') end
