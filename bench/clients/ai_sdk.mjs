// The AI SDK with its provider for OpenAI-compatible servers: generateText, streamText, generateObject, tools.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { LONG, N_TOKENS, QUESTION, checkWeather, expect, expectIdle, report } from "./cells.mjs";

const url = process.argv[2];
const provider = createOpenAICompatible({
  name: "slimoe",
  baseURL: `${url}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
  transformRequestBody: (body) => ({ ...body, ignore_eos: body.max_tokens > 1000 }),
});
const model = provider("demo");
const brief = { model, prompt: QUESTION, maxOutputTokens: N_TOKENS, temperature: 0, maxRetries: 0 };
const Weather = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });

await report("ai", {
  async chat() {
    expect((await generateText(brief)).text, "no text");
  },
  async stream() {
    const whole = await generateText(brief);
    const streamed = streamText(brief);
    let text = "";
    for await (const part of streamed.textStream) text += part;
    expect(text === whole.text, text);
    expect(["stop", "length"].includes(await streamed.finishReason), await streamed.finishReason);
  },
  async tools() {
    const given = [];
    const weather = tool({ inputSchema: Weather, execute: async (found) => (given.push(found), "18 degrees") });
    const answer = await generateText({
      ...brief,
      maxOutputTokens: 200,
      tools: { weather },
      toolChoice: "required",
      stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => (stepNumber > 0 ? { toolChoice: "none" } : {}),
    });
    checkWeather(given[0]);
    expect(answer.steps.length === 2, answer.steps.length);
    const streamed = streamText({ ...brief, maxOutputTokens: 200, tools: { weather }, toolChoice: { type: "tool", toolName: "weather" } });
    checkWeather((await streamed.toolCalls)[0].input);
  },
  async schema() {
    checkWeather((await generateObject({ ...brief, maxOutputTokens: 200, schema: Weather })).object);
  },
  async usage() {
    const streamed = streamText(brief);
    await streamed.consumeStream();
    const usage = await streamed.usage;
    expect(usage.inputTokens > 0 && usage.outputTokens > 0, usage);
  },
  async errors() {
    const error = await generateText({ ...brief, prompt: LONG }).catch((found) => found);
    expect(APICallError.isInstance(error) && error.statusCode === 400 && error.message.includes("context_length_exceeded"), error);
  },
  async cancel() {
    const stop = new AbortController();
    const streamed = streamText({ ...brief, maxOutputTokens: 1500, abortSignal: stop.signal, onError: () => {} });
    for await (const _ of streamed.textStream) {
      stop.abort();
      break;
    }
    await expectIdle(url);
  },
});
