-- Gives requests back that a runner did not finish.
-- KEYS: meta, item, pending, lease, owner, result, lost.  ARGV: owner, indices...  O(k log n).
local is_running = redis.call('HGET', KEYS[1], 'state') == 'running'
for i = 2, #ARGV do
  if redis.call('HGET', KEYS[5], ARGV[i]) == ARGV[1] then
    redis.call('ZREM', KEYS[4], ARGV[i])
    redis.call('HDEL', KEYS[5], ARGV[i])
    if is_running then redis.call('ZADD', KEYS[3], ARGV[i], ARGV[i]) end
  end
end
if is_running then redis.call('EXPIRE', KEYS[3], redis.call('HGET', KEYS[1], 'ttl')) end
return 1
