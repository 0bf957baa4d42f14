#!lua flags=allow-oom
-- Replaces parts of what is known of output lengths. Works in a full server: a part keeps its size.
-- KEYS: epoch, outputs.  ARGV: epoch, part, counts joined by commas, ...  Returns 1; error STALE.  O(k).
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('STALE epoch') end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
