#!lua flags=allow-oom
-- Renews the leases of a tenant's requests that still run.  KEYS: running.  ARGV: lease in milliseconds, names...
-- O(k log n).
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
