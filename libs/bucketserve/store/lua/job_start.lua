-- Ends a job's submission: from now on its requests, which are those of this submission, run.
-- KEYS: meta, upload, item, pending.  ARGV: total, digest, name of the upload.
-- Returns 1 if the job has these requests or was cancelled before it had any, 0 if it has others, -1 if it or the upload
-- is gone.  O(n log n).
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return -1 end
if state ~= 'loading' then
  redis.call('DEL', KEYS[2])
  local digest = redis.call('HGET', KEYS[1], 'digest')
  return (not digest or digest == ARGV[2]) and 1 or 0
end
if redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[1]) then return -1 end
redis.call('RENAME', KEYS[2], KEYS[3])
local time = redis.call('TIME')
local now = string.format('%d', time[1] * 1000000 + time[2])
redis.call('HSET', KEYS[1], 'total', ARGV[1], 'digest', ARGV[2], 'upload', ARGV[3] or '', 'state', 'running', 'started', now)
for i = 0, ARGV[1] - 1 do redis.call('ZADD', KEYS[4], i, i) end
local ttl = redis.call('HGET', KEYS[1], 'ttl')
for _, key in ipairs({KEYS[1], KEYS[3], KEYS[4]}) do redis.call('EXPIRE', key, ttl) end
return 1
