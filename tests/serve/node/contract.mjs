// The endpoint through OpenAI's own client for Node. Run by test_node_contract.py, which says in ENDPOINT where it is.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.ENDPOINT}/v1`, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const note = [{ role: "user", content: "Priya wants 3 melon pies at 14 Elm Street on Friday. Where?" }];
const plain = { model: "cria", messages: note, temperature: 0, max_tokens: 40 };
const order = {
  type: "object",
  properties: {
    name: { type: "string", maxLength: 12 },
    count: { type: "integer", minimum: 1, maximum: 99 },
    day: { enum: ["Monday", "Friday"] },
  },
  required: ["name", "count", "day"],
  additionalProperties: false,
};
const format = { type: "json_schema", json_schema: { name: "order", schema: order, strict: true } };
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Weather.",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Oslo", "La Paz"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
      required: ["city", "days"],
      additionalProperties: false,
    },
  },
};

/** Answers in the engine. */
async function underWay() {
  const text = await (await fetch(`${process.env.ENDPOINT}/metrics`)).text();
  const number = (name) => Number(text.match(new RegExp(`^altiplano_num_requests_${name} (\\S+)`, "m"))[1]);
  return number("running") + number("waiting");
}

async function until(reached) {
  while (!(await reached()));
}

/** While `story` runs no long answer ends: see pausing_engine.py. */
async function unending(story) {
  process.kill(Number(process.env.ENGINE), "SIGUSR1");
  try {
    await story();
  } finally {
    process.kill(Number(process.env.ENGINE), "SIGUSR2");
    await underWay(); // the engine looks up when it is asked something
  }
}

test("models are listed, page by page, and told apart", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepEqual(names, ["cria", "orders-1", "champion"]);
  const champion = await client.models.retrieve("champion");
  assert.equal(champion.object, "model");
  assert.equal(champion.parent, "cria");
});

test("a chat answer has its content, usage and request id", async () => {
  const answer = await client.chat.completions.create(plain, { headers: { "x-request-id": "node-1" } });
  assert.equal(answer.choices[0].message.content, "14 Elm Street");
  assert.equal(answer.choices[0].message.role, "assistant");
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.equal(answer._request_id, "node-1");
});

test("a stream says the same, piece by piece, and ends with its usage", async () => {
  const said = [];
  let usage = null;
  for await (const chunk of await client.chat.completions.create({
    ...plain,
    stream: true,
    stream_options: { include_usage: true },
  })) {
    if (chunk.choices.length) said.push(chunk.choices[0].delta.content ?? "");
    usage = chunk.usage ?? usage;
  }
  assert.equal(said.join(""), "14 Elm Street");
  assert.ok(said.filter(Boolean).length > 2);
  assert.ok(usage.completion_tokens > 2);
});

test("the client's own helper puts a stream together", async () => {
  const stream = client.chat.completions.stream({ ...plain, stream_options: { include_usage: true } });
  const pieces = [];
  stream.on("content", (delta) => pieces.push(delta));
  assert.equal(await stream.finalContent(), "14 Elm Street");
  assert.equal(pieces.join(""), "14 Elm Street");
  const whole = await stream.finalChatCompletion();
  assert.equal(whole.choices[0].finish_reason, "stop");
  assert.ok((await stream.totalUsage()).total_tokens > 0);
});

test("completions take text and token ids, with logprobs", async () => {
  const wanted = { model: "cria", max_tokens: 5, temperature: 0, logprobs: 2 };
  const answer = await client.completions.create({ ...wanted, prompt: "A note" });
  assert.equal(answer.object, "text_completion");
  const { tokens, token_logprobs: scores, top_logprobs: tops } = answer.choices[0].logprobs;
  assert.equal(tokens.join(""), answer.choices[0].text);
  assert.ok(scores.every((score, i) => score <= 0 && Object.keys(tops[i]).length === 2));
  const several = await client.completions.create({ model: "cria", max_tokens: 3, temperature: 0, prompt: [[5, 6], [7, 8, 9]] });
  assert.deepEqual(several.choices.map((choice) => choice.index), [0, 1]);
});

test("several answers, seeds and stop strings", async () => {
  const wild = { model: "cria", prompt: [5, 6, 7], temperature: 2, seed: 3, n: 3, max_tokens: 12 };
  const texts = async () => (await client.completions.create(wild)).choices.map((choice) => choice.text);
  const first = await texts();
  assert.deepEqual(await texts(), first);
  assert.equal(new Set(first).size, 3);
  assert.equal((await client.chat.completions.create({ ...plain, stop: ["m Str"] })).choices[0].message.content, "14 El");
});

test("chat logprobs name the tokens and their rivals", async () => {
  const answer = await client.chat.completions.create({ ...plain, logprobs: true, top_logprobs: 2 });
  const { content } = answer.choices[0].logprobs;
  assert.equal(content.map((entry) => entry.token).join(""), "14 Elm Street");
  assert.ok(content.every((entry) => entry.top_logprobs.length === 2 && entry.logprob <= 0));
});

test("a schema is followed and parsed", async () => {
  const wild = { model: "cria", messages: note, max_tokens: 60, temperature: 2, seed: 7, response_format: format };
  const answer = await client.chat.completions.create(wild);
  const said = JSON.parse(answer.choices[0].message.content);
  assert.deepEqual(Object.keys(said).sort(), ["count", "day", "name"]);
  assert.ok(["Monday", "Friday"].includes(said.day) && said.count >= 1 && said.count <= 99);
  const parsed = await client.chat.completions.parse(wild);
  assert.equal(parsed.choices[0].message.refusal, null);
});

test("a tool is called, whole and streamed, and its result is taken", async () => {
  const wanted = { ...plain, tools: [weather], tool_choice: "required", temperature: 1, seed: 5, max_tokens: 60 };
  const answer = await client.chat.completions.create(wanted);
  const { message, finish_reason } = answer.choices[0];
  assert.equal(finish_reason, "tool_calls");
  const [call] = message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  const given = JSON.parse(call.function.arguments);
  assert.ok(["Oslo", "La Paz"].includes(given.city) && given.days >= 1);

  const streamed = await client.chat.completions.stream({ ...wanted }).finalChatCompletion();
  assert.deepEqual(JSON.parse(streamed.choices[0].message.tool_calls[0].function.arguments), given);

  const told = [...note, message, { role: "tool", tool_call_id: call.id, content: "rain" }];
  const next = await client.chat.completions.create({ ...plain, messages: told, tools: [weather] });
  assert.ok(["stop", "length", "tool_calls"].includes(next.choices[0].finish_reason));
});

test("errors come as the client's own classes, with what to change", async () => {
  await assert.rejects(client.chat.completions.create({ ...plain, model: "gpt-9" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.equal(error.param, "model");
    assert.match(error.message, /orders-1/);
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...plain, temperature: 9 }), OpenAI.BadRequestError);
  await assert.rejects(client.chat.completions.create({ ...plain, max_tokens: 50_000, stream: true }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.code, "context_length_exceeded");
    return true;
  });
  await assert.rejects(client.models.retrieve("nobody"), OpenAI.NotFoundError);
});

test("a stream that is given up frees its place", async () => {
  const long = { model: "cria", prompt: "A note", max_tokens: 1200, ignore_eos: true, stream: true };
  const stream = await client.completions.create(long);
  for await (const _ of stream) break; // leaves: the client aborts
  const control = new AbortController();
  const other = await client.completions.create(long, { signal: control.signal });
  let chunks = 0;
  // The client ends an aborted stream without an error.
  for await (const _ of other) if (++chunks === 2) control.abort();
  assert.ok(chunks < 1200);
  await until(async () => (await underWay()) === 0);
});

test("a whole answer can be given up too", async () => {
  const control = new AbortController();
  await unending(async () => {
    const asked = client.completions.create(
      { model: "cria", prompt: "A note", max_tokens: 1200, ignore_eos: true, n: 4 },
      { signal: control.signal },
    );
    await until(async () => (await underWay()) === 4);
    control.abort();
    await assert.rejects(asked, OpenAI.APIUserAbortError);
  });
  await until(async () => (await underWay()) === 0);
});
