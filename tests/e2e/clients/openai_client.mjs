// A client with OpenAI's library for Node. `node openai_client.mjs URL WHAT` does one of the things below and prints what
// it saw as JSON. API_KEY is a client's; NODE_EXTRA_CA_CERTS names a CA, as for all that Node connects to.
import OpenAI from "openai";

const MESSAGES = [{ role: "user", content: "Tell me of the king" }];
const CHAT = { model: "demo", messages: MESSAGES, max_tokens: 20, temperature: 0, ignore_eos: true };
const LONG = { ...CHAT, max_tokens: 1500, stream: true };
const [baseURL, what] = process.argv.slice(2);
const connect = (options) => new OpenAI({ baseURL, apiKey: process.env.API_KEY || "-", maxRetries: 0, ...options });

// What a call that fails fails with.
async function failure(call) {
  try {
    await call;
  } catch (error) {
    const { constructor, status, code, param } = error;
    return { kind: constructor.name, status, code, param, delay: error.headers?.get("retry-after-ms") };
  }
  return {};
}

const DO = {
  async models(client) {
    return (await client.models.list()).data.map(({ id }) => id);
  },

  async stream(client) {
    const whole = await client.chat.completions.create(CHAT);
    let text = "";
    let usage;
    for await (const chunk of await client.chat.completions.create({
      ...CHAT,
      stream: true,
      stream_options: { include_usage: true },
    })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    // The library's own helper, which puts the pieces together.
    const helper = client.chat.completions.stream(CHAT);
    const put = await helper.finalChatCompletion();
    const completion = await client.completions.create({ model: "demo", prompt: [5, 6, 7], max_tokens: 20 });
    return {
      whole: whole.choices[0].message.content,
      text,
      usage,
      put: put.choices[0].message.content,
      reason: put.choices[0].finish_reason,
      completion: completion.choices[0].text,
    };
  },

  // Leaves two streams, in both of the library's ways, and a call without a stream.
  async cancel(client) {
    for await (const _ of await client.chat.completions.create(LONG)) break;
    const stream = await client.chat.completions.create(LONG);
    for await (const _ of stream) {
      stream.controller.abort();
    }
    const signal = AbortSignal.timeout(500);
    return failure(client.chat.completions.create({ ...LONG, stream: false }, { signal }));
  },

  async deadline(client) {
    return failure(client.chat.completions.create({ ...LONG, stream: false }, { timeout: 500 }));
  },

  async errors(client) {
    const bad = {
      "unknown parameter": { unheard_of: 1 },
      "unknown model": { model: "nobody" },
      "wrong type": { max_tokens: "many" },
      "no messages": { messages: [] },
      "too hot": { temperature: 1000 },
    };
    const found = Object.entries(bad).map(async ([name, more]) => [
      name,
      await failure(client.chat.completions.create({ ...CHAT, ...more })),
    ]);
    return Object.fromEntries(await Promise.all(found));
  },

  // Thirty at once by a client that does not try again, then twelve by one that does.
  async overload(client) {
    const calls = Array.from({ length: 30 }, () => failure(client.chat.completions.create(CHAT)));
    const found = await Promise.all(calls);
    const patient = connect({ maxRetries: 20 });
    const served = await Promise.all(Array.from({ length: 12 }, () => patient.chat.completions.create(CHAT)));
    return { found, served: served.map(({ usage }) => usage.completion_tokens) };
  },

  async keys() {
    const keys = [process.env.API_KEY, "-", "x".repeat(43)];
    return Promise.all(keys.map((apiKey) => failure(connect({ apiKey }).chat.completions.create(CHAT))));
  },
};

console.log(JSON.stringify(await DO[what](connect())));
