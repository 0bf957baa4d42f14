#!lua flags=allow-oom
-- Takes a request and its tokens from what a tenant may have, if there is enough of everything. Works in a full server:
-- nobody gets more by filling it.
-- KEYS: requests, tokens, running.
-- ARGV: name, tokens, requests a minute, tokens a minute, requests at once (0: no limit), lease in milliseconds.
-- Returns which limit is in the way (0: none; 1, 2, 3 as above) and for how many milliseconds.  O(log n).
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local minute = 60
local which, wait = 0, 0
local levels = {}
for i, cost in ipairs({1, tonumber(ARGV[2])}) do
  local limit = tonumber(ARGV[i + 2])
  if limit > 0 then
    -- When all that was taken will have come back: a minute ahead is empty. What is more than a minute's worth takes all.
    -- Nothing takes longer, but for what was taken before the server's clock was set back.
    local level = math.min(math.max(tonumber(redis.call('GET', KEYS[i]) or '0'), now), now + minute)
    levels[i] = level + math.min(cost, limit) * minute / limit
    local over = levels[i] - now - minute
    -- Less is the rounding of a full minute.
    if over > 0.001 and over > wait then which, wait = i, over end
  end
end
local most = tonumber(ARGV[5])
local now_ms = math.floor(now * 1000)
if most > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now_ms)
  -- Leases that end later than any could were given before it was set back.
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. now_ms + 2 * ARGV[6], '+inf', 'LIMIT', 0, 1000)) do
    redis.call('ZADD', KEYS[3], now_ms + ARGV[6], name)
  end
  if which == 0 and redis.call('ZCARD', KEYS[3]) >= most then which, wait = 3, 1 end
end
if which > 0 then return {which, math.ceil(wait * 1000)} end
for i, level in pairs(levels) do
  redis.call('SET', KEYS[i], string.format('%.6f', level), 'PX', math.ceil((level - now) * 1000) + 1000)
end
if most > 0 then
  redis.call('ZADD', KEYS[3], now_ms + ARGV[6], ARGV[1])
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
end
return {0, 0}
