-- Moves waiting records to a worker.
-- KEYS: epoch, waiting, claim.  ARGV: epoch, worker id, batch id, ids...
-- Returns the ids that are now claimed by this batch, also if an earlier call of the same claim did it; error STALE.
-- O(k log n).
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('STALE epoch') end
local mark = ARGV[2] .. '\n' .. ARGV[3]
local claimed = {}
for i = 4, #ARGV do
  if redis.call('ZREM', KEYS[2], ARGV[i]) == 1 then
    redis.call('HSET', KEYS[3], ARGV[i], mark)
    claimed[#claimed + 1] = ARGV[i]
  elseif redis.call('HGET', KEYS[3], ARGV[i]) == mark then
    claimed[#claimed + 1] = ARGV[i]
  end
end
return claimed
