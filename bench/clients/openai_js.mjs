// openai-js: chat completions, the streaming helper, `.parse()`, `runTools` and the Responses API.

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import { ASKED, LONG, N_TOKENS, QUESTION, WEATHER, checkWeather, expect, expectIdle, report } from "./cells.mjs";

const url = process.argv[2];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const brief = { model: "demo", messages: ASKED, max_tokens: N_TOKENS, temperature: 0 };
const tool = { type: "function", function: { name: "weather", parameters: WEATHER, strict: true } };
const Weather = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });

await report("openai", {
  async chat() {
    const answer = await client.chat.completions.create(brief);
    expect(answer.choices[0].message.content, answer);
  },
  async stream() {
    const whole = await client.chat.completions.create(brief);
    const final = await client.chat.completions.stream(brief).finalChatCompletion();
    expect(final.choices[0].message.content === whole.choices[0].message.content, final);
  },
  async tools() {
    let given = null;
    const weather = { ...tool.function, parse: JSON.parse, function: (found) => ((given = found), "18 degrees") };
    const runner = client.chat.completions.runTools(
      { model: "demo", messages: ASKED, max_tokens: 200, temperature: 0, tool_choice: { type: "function", function: { name: "weather" } }, tools: [{ type: "function", function: weather }] },
      { maxChatCompletions: 2 },
    );
    await runner.done();
    checkWeather(given);
    const streamed = client.chat.completions.stream({ ...brief, max_tokens: 200, tools: [tool], tool_choice: "required", parallel_tool_calls: false });
    const call = (await streamed.finalChatCompletion()).choices[0].message.tool_calls[0];
    checkWeather(call.function.arguments);
  },
  async schema() {
    const response_format = zodResponseFormat(Weather, "weather");
    const parsed = await client.chat.completions.parse({ ...brief, max_tokens: 200, response_format });
    checkWeather(parsed.choices[0].message.parsed);
  },
  async usage() {
    const chunks = await client.chat.completions.create({ ...brief, stream: true, stream_options: { include_usage: true } });
    let usage = null;
    for await (const chunk of chunks) usage = chunk.usage ?? usage;
    expect(usage.completion_tokens > 0, usage);
  },
  async errors() {
    const error = await client.chat.completions.create({ model: "demo", messages: [{ role: "user", content: LONG }] }).catch((found) => found);
    expect(error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded", error);
  },
  async cancel() {
    const chunks = await client.chat.completions.create({ ...brief, max_tokens: 1500, ignore_eos: true, stream: true });
    for await (const _ of chunks) break;
    await expectIdle(url);
  },
  async responses() {
    const whole = await client.responses.create({ model: "demo", input: QUESTION, max_output_tokens: N_TOKENS, temperature: 0 });
    const streamed = client.responses.stream({ model: "demo", input: QUESTION, max_output_tokens: N_TOKENS, temperature: 0 });
    expect((await streamed.finalResponse()).output_text === whole.output_text, whole);
  },
});
