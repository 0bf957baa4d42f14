#!lua flags=allow-oom
-- Takes a request and its tokens from what a tenant may have, if there is enough of everything. Works in a full server:
-- nobody gets more by filling it.
-- KEYS: requests, tokens, running.
-- ARGV: name, tokens, requests a minute, tokens a minute, requests at once, tokens at once (0: no limit), lease in
-- milliseconds.
-- Returns which limit is in the way (0: none; 1, 2, 3, 4 as above) and for how many milliseconds.  O(log n).
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
local most, most_tokens, lease = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local now_ms = math.floor(now * 1000)
local is_counted = most > 0 or most_tokens > 0
local function tokens_of(name) return tonumber(string.match(name, '^(%d+):') or 0) end
local held = 0
if is_counted then
  held = -(tonumber(redis.call('ZSCORE', KEYS[3], '')) or 0)
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '(0', now_ms)) do
    redis.call('ZREM', KEYS[3], name)
    held = held - tokens_of(name)
  end
  -- Below zero it can only be where the sum was lost before those that were in it have ended.
  held = math.max(held, 0)
  -- Leases that end later than any could were given before it was set back.
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. now_ms + 2 * lease, '+inf', 'LIMIT', 0, 1000)) do
    redis.call('ZADD', KEYS[3], now_ms + lease, name)
  end
  if held > 0 then redis.call('ZADD', KEYS[3], -held, '') else redis.call('ZREM', KEYS[3], '') end
  if which == 0 and most > 0 and redis.call('ZCOUNT', KEYS[3], '(0', '+inf') >= most then which, wait = 3, 1 end
  -- One that is larger than the limit may run alone.
  if which == 0 and most_tokens > 0 and held > 0 and held + ARGV[2] > most_tokens then which, wait = 4, 1 end
end
if which > 0 then return {which, math.ceil(wait * 1000)} end
for i, level in pairs(levels) do
  redis.call('SET', KEYS[i], string.format('%.6f', level), 'PX', math.ceil((level - now) * 1000) + 1000)
end
if is_counted then
  redis.call('ZADD', KEYS[3], now_ms + lease, ARGV[1])
  held = held + tokens_of(ARGV[1])
  if held > 0 then redis.call('ZADD', KEYS[3], -held, '') end
  redis.call('PEXPIRE', KEYS[3], lease)
end
return {0, 0}
