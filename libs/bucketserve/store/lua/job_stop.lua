-- Lets a batch be over now, unless it has ended; one that is loading is cancelled.
-- KEYS: meta.  O(1).
local state = redis.call('HGET', KEYS[1], 'state')
local time = redis.call('TIME')
local now = string.format('%d', time[1] * 1000000 + time[2])
if state == 'loading' then redis.call('HSET', KEYS[1], 'state', 'cancelled', 'stopped', now, 'ended', now) end
if state == 'running' then redis.call('HSETNX', KEYS[1], 'stopped', now) end
return 1
