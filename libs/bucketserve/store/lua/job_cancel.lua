-- Ends a job, unless it has ended: nobody runs its requests any more.
-- KEYS: meta, item, pending, lease, owner, result, lost.  O(n).
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'loading' or state == 'running' then
  redis.call('HSET', KEYS[1], 'state', 'cancelled')
  redis.call('DEL', KEYS[3], KEYS[4], KEYS[5], KEYS[7])
end
return 1
