// A client with Node's own gRPC library, by the proto files alone.
//
// `node grpc_client.mjs ADDRESS WHAT` does one of the things below and prints what it saw as JSON. PROTOS is the list of
// folders with proto files, CA_FILE and API_KEY as a client would have them.
import { readFileSync } from "node:fs";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROMPT = "In the beginning";
const definition = protoLoader.loadSync(
  ["bucketserve/v1/inference.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"],
  { includeDirs: process.env.PROTOS.split(":"), keepCase: true, longs: Number, enums: String, oneofs: true, defaults: true },
);
const { InferenceService } = grpc.loadPackageDefinition(definition).bucketserve.v1;

// Each of the messages of a call's status, by name.
function details(error) {
  const packed = error.metadata?.get("grpc-status-details-bin")[0];
  if (packed === undefined) return {};
  const status = definition["google.rpc.Status"].deserialize(packed);
  return Object.fromEntries(
    status.details.map((any) => {
      const name = any.type_url.split("/").pop();
      return [name, definition[name].deserialize(any.value)];
    }),
  );
}

// All of a stream: its text, tokens and end, and how it failed.
function taken(call, onFirst = () => {}) {
  const found = { text: "", tokens: [], chunks: 0 };
  return new Promise((resolve) => {
    call.on("data", (response) => {
      if (response.event === "chunk") {
        if (found.chunks++ === 0) onFirst(call);
        found.text += response.chunk.text;
        found.tokens.push(...response.chunk.token_ids);
      } else if (response.event === "finished") {
        found.reason = response.finished.reason;
        found.usage = response.finished.usage;
      }
    });
    call.on("error", (error) =>
      resolve({ ...found, code: grpc.status[error.code], message: error.details, details: details(error) }),
    );
    call.on("end", () => found.reason && resolve({ ...found, code: "OK" }));
  });
}

function generate(client, request, ...more) {
  const stopping = { max_tokens: 20, ignore_eos: true };
  return client.Generate({ prompt: PROMPT, stopping, ...request }, key(), ...more);
}

function key(value = process.env.API_KEY) {
  const metadata = new grpc.Metadata();
  if (value) metadata.set("authorization", `Bearer ${value}`);
  return metadata;
}

const LONG = { stopping: { max_tokens: 1500, ignore_eos: true } };

const DO = {
  // Text, token ids and a chat, side by side on one connection.
  async stream(client) {
    const requests = {
      text: {},
      ids: { prompt: undefined, token_ids: { ids: [5, 6, 7] } },
      chat: { prompt: undefined, chat: { messages: [{ role: "user", content: PROMPT }] } },
      seeded: { sampling: { temperature: 0.9, top_k: 20, seed: 7 } },
    };
    const found = await Promise.all(Object.values(requests).map((request) => taken(generate(client, request))));
    return Object.fromEntries(Object.keys(requests).map((name, index) => [name, found[index]]));
  },

  async models(client) {
    return new Promise((resolve) =>
      client.ListModels({}, key(), (error, response) =>
        resolve(error ? { code: grpc.status[error.code], message: error.details } : response),
      ),
    );
  },

  // Leaves five streams after their first tokens.
  async cancel(client) {
    const calls = Array.from({ length: 5 }, () => taken(generate(client, LONG), (call) => call.cancel()));
    return (await Promise.all(calls)).map(({ code }) => code);
  },

  // Ends without a word in the middle of a stream.
  async leave(client) {
    return new Promise(() => taken(generate(client, LONG), () => process.exit(7)));
  },

  async deadline(client) {
    return taken(generate(client, LONG, { deadline: Date.now() + 1000 }));
  },

  async errors(client) {
    const bad = {
      "no prompt": { prompt: undefined },
      "empty prompt": { prompt: "" },
      "unknown model": { model: "nobody" },
      NaN: { sampling: { temperature: NaN } },
      "too many tokens": { stopping: { max_tokens: 2 ** 32 - 1 } },
      "two wrong fields": { sampling: { temperature: -1, top_p: 2 } },
      "4 MB": { prompt: "a".repeat(4_000_000) },
    };
    const found = await Promise.all(Object.values(bad).map((request) => taken(generate(client, request))));
    return Object.fromEntries(Object.keys(bad).map((name, index) => [name, found[index]]));
  },

  // Thirty at once, then one, when all have ended.
  async overload(client) {
    const found = await Promise.all(Array.from({ length: 30 }, () => taken(generate(client, {}))));
    return { found, after: await taken(generate(client, {})) };
  },

  // With the key, with none, and with one that nobody was given.
  async keys(client) {
    const request = { prompt: PROMPT, stopping: { max_tokens: 3, ignore_eos: true } };
    const attempts = [process.env.API_KEY, "", "x".repeat(43)];
    return Promise.all(attempts.map((value) => taken(client.Generate(request, key(value)))));
  },
};

const [address, what] = process.argv.slice(2);
const ca = process.env.CA_FILE;
const credentials = ca ? grpc.credentials.createSsl(readFileSync(ca)) : grpc.credentials.createInsecure();
const client = new InferenceService(address, credentials);
console.log(JSON.stringify(await DO[what](client)));
client.close();
