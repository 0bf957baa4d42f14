#!lua flags=allow-oom
-- Takes or renews the leadership.
-- KEYS: leader, epoch.  ARGV: owner, time to live in milliseconds, epoch that is renewed (0: none).
-- Returns the fencing epoch, or -1 while someone else leads.  O(1).
-- An expired leader whom nobody replaced goes on under its old epoch only if it renews that one and the epoch still names
-- it: the owner of the last epoch is kept beside it, so that a flushed or failed-over server starts a new one. Who leads
-- anew has a new one too: what it wrote and ordered before may arrive late, and is not to be taken for what it does now.
-- A lease that ends later than any could was given before the server's clock was set back: it would last for as long as
-- the clock was ahead, and nobody could lead. It is cut down to what a lease is; a holder who lives renews it.
-- A new epoch is at least the server's time in seconds, so that it also grows across a loss of all data.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  if redis.call('PTTL', KEYS[1]) > 2 * ARGV[2] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
  return -1
end
local epoch, renewed = tonumber(redis.call('HGET', KEYS[2], 'epoch') or '0'), tonumber(ARGV[3])
-- A renewal of before that comes late, when its sender has begun to lead anew.
if holder and 0 < renewed and renewed < epoch then return -1 end
if epoch == 0 or epoch ~= renewed or redis.call('HGET', KEYS[2], 'owner') ~= ARGV[1] then
  epoch = math.max(epoch + 1, tonumber(redis.call('TIME')[1]))
  redis.call('HSET', KEYS[2], 'epoch', string.format('%d', epoch), 'owner', ARGV[1])
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return epoch
