// The chat page: the conversation on screen, the list of those kept in the browser, and the settings.

import { Conversations, MemoryStorage, isConversationKey, newConversation, titleOf } from "./conversations.js";
import { parseBlock, split, textOf, toDom } from "./markdown.js";

const SETTINGS_KEY = "anarchobot/settings";
const SAMPLING = ["temperature", "top_p", "max_tokens"];  // the ids of their fields and the names in requests
const at = id => document.getElementById(id);
const [talk, spoken, ask, question, unlock, chats] = ["talk", "spoken", "ask", "question", "unlock", "chats"].map(at);
const isWide = matchMedia("(min-width: 52.01rem)"), isDark = matchMedia("(prefers-color-scheme: dark)");
const storage = openStorage();
const conversations = new Conversations(storage);
const settings = readSettings();
let key = "", model = null, current = newConversation();
let pending = null;  // aborts the request for the answer that is being written

function openStorage() {
  try {
    return localStorage;  // raises an error if the browser forbids it
  } catch {
    return new MemoryStorage();
  }
}

// A new element; null among the children stands for none. Text is never parsed as HTML.
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter(child => child !== null));
  return made;
}

const button = (label, onClick, properties = {}) =>
  element("button", { type: "button", textContent: label, onclick: onClick, ...properties });

// Browsers offer the clipboard to pages of this machine and to encrypted ones only.
function copyButton(description, text) {
  if (!navigator.clipboard) return null;
  return button("Copy", async ({ target }) => {
    await navigator.clipboard.writeText(text);
    target.textContent = target.ariaLabel = "Copied";
    speak("Copied");
  }, { ariaLabel: description });
}

// Text for screen readers only.
const speak = text => spoken.append(element("p", { textContent: text }));

// Changes the conversation on screen, and keeps its end in view if it was.
function follow(change) {
  const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
  change();
  if (atEnd) talk.scrollTop = talk.scrollHeight;
}

function note(text, role = "status") {
  follow(() => talk.append(element("p", { className: "note", role, textContent: text })));
}

// --- Messages

function messageElement(message, index) {
  const isUser = message.role === "user", body = element("div", { className: isUser ? "body" : "body answer" });
  if (isUser) body.textContent = message.content;
  else showAnswer(body, message.content);
  return element("article", { className: `message ${message.role}`, ariaLabel: isUser ? "You" : at("name").textContent },
    isUser ? null : reasoningElement(message.reasoning), body, ...message.content ? footer(message, index) : []);
}

// What a model wrote before its answer.
function reasoningElement(text = "") {
  return element("details", { className: "reasoning", hidden: !text }, element("summary", { textContent: "Reasoning" }),
    element("blockquote", { textContent: text, tabIndex: 0 }));
}

// Renders an answer again after it has grown; blocks that did not change stay.
function showAnswer(body, text) {
  const sources = split(text);
  let same = 0;
  while (same < body.children.length && body.children[same].source === sources[same]) same++;
  while (body.children.length > same) body.lastElementChild.remove();
  for (const source of sources.slice(same)) {
    const node = parseBlock(source), frame = element("div", {}, toDom(node));
    frame.querySelectorAll("pre").forEach(frameCode);
    frame.querySelectorAll("table").forEach(frameTable);
    body.append(Object.assign(frame.firstElementChild, { source, text: textOf(node) }));
  }
}

function frameCode(pre) {
  const caption = element("figcaption", {}, pre.dataset.language ?? "code", copyButton("Copy this code", pre.textContent));
  const figure = element("figure", {}, caption);
  pre.replaceWith(figure);
  pre.tabIndex = 0;  // so that the arrow keys scroll it
  figure.append(pre);
}

function frameTable(table) {
  const frame = element("div", { className: "table", tabIndex: 0 });
  table.replaceWith(frame);
  frame.append(table);
}

// Notes, sources and buttons below a message.
function footer(message, index) {
  const isUser = message.role === "user", isLast = index >= current.messages.length - 1;
  const { notes = [], sources = [] } = message;
  const passages = sources.map(({ source, text }) =>
    element("li", {}, element("cite", { textContent: source }), element("blockquote", { textContent: text, tabIndex: 0 })));
  return [
    ...notes.map(text => element("p", { className: "note", textContent: text })),
    ...sources.length ? [element("details", { className: "sources" },
      element("summary", { textContent: sources.length === 1 ? "1 source" : `${sources.length} sources` }),
      element("ol", {}, ...passages))] : [],
    element("div", { className: "actions" },
      copyButton(isUser ? "Copy this message" : "Copy this answer", message.content),
      isUser ? button("Edit", () => edit(index), { className: "when-idle", ariaLabel: "Edit this message" }) : null,
      !isUser && isLast ? button("Regenerate", regenerate, { className: "when-idle", ariaLabel: "Regenerate this answer" })
        : null),
  ];
}

function draw() {
  talk.replaceChildren(...current.messages.map(messageElement));
  spoken.replaceChildren();
  talk.scrollTop = talk.scrollHeight;
}

function edit(index, text = current.messages[index].content) {
  if (pending) return;
  const later = current.messages.length - index - 1;
  const field = element("textarea", { value: text, ariaLabel: "Edit your message", rows: 1 });
  const cancel = () => {
    draw();
    question.focus();
  };
  const form = element("form", { className: "edit" }, field,
    element("p", { className: "hint",
      textContent: later === 1 ? "Replaces the message below it." : `Replaces the ${later} messages below it.` }),
    element("div", { className: "actions" }, element("button", { textContent: "Send" }), button("Cancel", cancel)));
  form.addEventListener("submit", event => {
    event.preventDefault();
    send(field, current.messages.slice(0, index), text => edit(index, text));
  });
  sendOnEnter(field, form);
  field.addEventListener("keydown", event => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    cancel();
  });
  talk.children[index].replaceChildren(form);
  field.focus();
}

function regenerate() {
  if (!pending && isValid()) answer(current.messages.slice(0, -1), () => {});
}

// Sends the text of a field after `earlier` messages; `restore` gets it back if there is no answer.
function send(field, earlier, restore) {
  const text = field.value.trim();
  if (!text || pending || !isValid()) return;
  field.value = "";
  answer([...earlier, { role: "user", content: text }], () => restore(text));
  question.focus();
}

function sendOnEnter(field, form) {
  field.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

// --- Requests

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch(error => {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  });
  if (response.ok) return response;
  const error = await response.json().then(body => body.error, () => null);
  throw Object.assign(new Error(error?.message ?? `HTTP error ${response.status}`),
    { status: response.status, code: error?.code });
}

// The events of a stream, as JSON objects.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read().catch(error => {
      throw error.name === "AbortError" ? error : new Error("The connection was lost.");
    });
    if (done) throw new Error("The connection was lost.");
    const blocks = (buffer + value).split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

const charactersOf = messages => messages.reduce((sum, { content }) => sum + content.length, 0);

// Asks for an answer to `messages`. Leaves out the oldest while they fill more than half of the context window, by the
// last answer's tokens per character, or do not fit. Returns the response and the messages that were sent.
async function request(conversation, messages, reply, signal) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system.trim() }] : [];
  let skipped = 0;
  const sent = () => [...system, ...messages.slice(skipped).map(({ role, content }) => ({ role, content }))];
  const isCrowded = () => conversation.density * charactersOf(sent()) > model.max_model_len / 2;
  while (messages.length - skipped > 2 && isCrowded()) skipped += 2;
  for (;;) {
    const body = JSON.stringify({ model: model.id, messages: sent(), stream: true,
      stream_options: { include_usage: true }, ...sampling() });
    try {
      const response = await call("/v1/chat/completions", { method: "POST", body, signal });
      if (skipped) reply.notes.push(`(the first ${skipped} messages no longer fit in the context window)`);
      return [response, sent()];
    } catch (error) {
      if (error.code !== "context_length_exceeded" || messages.length - skipped < 3) throw error;
      skipped += 2;
    }
  }
}

// Replaces the messages of the conversation by `messages` and an answer to them. Without one, nothing changes, and
// `restore` is called.
async function answer(messages, restore) {
  const conversation = current, before = conversation.messages, controller = new AbortController();
  const reply = { role: "assistant", content: "", reasoning: "", notes: [] };
  conversation.messages = messages;
  draw();
  const article = messageElement(reply, messages.length), [reasoning, body] = article.children;
  article.classList.add("streaming");
  talk.append(article);
  talk.scrollTop = talk.scrollHeight;
  setPending(controller);
  let blocksSpoken = 0, problem = "", frame = 0;
  const speakBlocks = end => { for (; blocksSpoken < end; blocksSpoken++) speak(body.children[blocksSpoken].text); };
  const update = () => {
    frame = 0;
    follow(() => {
      reasoning.hidden = !reply.reasoning;
      reasoning.lastElementChild.textContent = reply.reasoning;
      showAnswer(body, reply.content);
    });
    speakBlocks(body.children.length - 2);  // the last two can still change
  };
  try {
    const [response, sent] = await request(conversation, messages, reply, controller.signal);
    for await (const event of events(response)) {
      if (event.sources?.length) reply.sources = event.sources.map(({ source, text }) => ({ source, text }));
      if (event.dropped_passages)
        reply.notes.push(`(${event.dropped_passages} passages did not fit in the context window)`);
      if (event.usage) {
        const passages = (reply.sources ?? []).map(({ text }) => ({ content: text }));
        const all = [...sent, ...passages, { content: reply.reasoning }, reply];
        conversation.density = event.usage.total_tokens / (charactersOf(all) || 1);
      }
      const choice = event.choices[0];
      if (choice?.finish_reason === "length") reply.notes.push("(truncated at the token limit)");
      if (!choice?.delta.content && !choice?.delta.reasoning_content) continue;
      reply.reasoning += choice.delta.reasoning_content ?? "";
      reply.content += choice.delta.content ?? "";
      if (reply.content) conversation.messages = [...messages, reply];
      frame ||= requestAnimationFrame(update);
    }
    if (!reply.content) problem = "(empty answer)";
  } catch (error) {
    if (error.name !== "AbortError") problem = error.message;
    if (error.status === 401) lock();
  }
  cancelAnimationFrame(frame);
  if (pending === controller) setPending(null);
  if (reply.content && problem) reply.notes.push(problem);
  if (!reply.content) conversation.messages = before;
  if (conversation !== current) return keep(conversation);
  if (reply.content) {
    update();
    article.classList.remove("streaming");
    follow(() => article.append(...footer(reply, messages.length)));
    speakBlocks(body.children.length);
    reply.notes.forEach(speak);
    keep(conversation);
  } else {
    draw();
    restore();
    if (problem) note(problem, "alert");
  }
  if (!ask.hidden && [document.body, null].includes(document.activeElement)) question.focus();
}

function setPending(controller) {
  const hadFocus = document.activeElement === at("stop");
  pending = controller;
  [at("send").hidden, at("stop").hidden] = [pending !== null, pending === null];
  talk.ariaBusy = String(pending !== null);
  if (hadFocus && !pending) question.focus();
}

// --- Kept conversations

function keep(conversation) {
  if (conversation.isDeleted || conversation.messages.at(-1)?.role !== "assistant") return;
  try {
    for (const deleted of conversations.save(conversation))
      note(`Deleted the oldest chat, "${titleOf(deleted)}", to make room.`);
  } catch (error) {
    note(error.message, "alert");
  }
  if (conversation === current) setAddress();
  drawList();
}

const setAddress = () => history.replaceState(null, "", current.messages.length ? `#${current.id}` : location.pathname);

function openConversation(conversation) {
  pending?.abort();
  current = conversation;
  at("system").value = current.system;
  draw();
  drawList();
  setAddress();
  if (!isWide.matches) showChats(false);
  if (!ask.hidden) question.focus();
}

const newChat = () => openConversation(newConversation(current.system));

function drawList() {
  const { conversations: kept, damaged } = conversations.read();
  at("list").replaceChildren(...kept.map(conversation => {
    const title = titleOf(conversation), isCurrent = conversation.id === current.id;
    const item = element("li", {},
      button(title, () => isCurrent || openConversation(conversation), isCurrent ? { ariaCurrent: "true" } : {}),
      button("✎", () => rename(item, conversation), { ariaLabel: `Rename ${title}`, title: "Rename" }),
      button("×", () => remove(conversation), { ariaLabel: `Delete ${title}`, title: "Delete" }));
    return item;
  }));
  const place = storage instanceof MemoryStorage ? "Kept until this page is closed: the browser allows no storage."
    : "Kept in this browser only.";
  at("list-note").textContent = damaged ? `${place} Damaged, not shown: ${damaged}.` : place;
  at("delete-all").hidden = !kept.length && !damaged;
}

function rename(item, conversation) {
  const field = element("input", { value: titleOf(conversation), ariaLabel: "Title", maxLength: 80 });
  const target = conversation.id === current.id ? current : conversation;
  const end = title => {
    field.onblur = null;
    if (title !== undefined) {
      target.title = title.trim();
      keep(target);
    }
    drawList();
  };
  field.onblur = () => end(field.value);
  field.onkeydown = event => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.stopPropagation();
    end(event.key === "Enter" ? field.value : undefined);
    at("list").querySelector("[aria-current], button")?.focus();
  };
  item.replaceChildren(field);
  field.focus();
  field.select();
}

function remove(conversation) {
  if (!confirm(`Delete "${titleOf(conversation)}"?`)) return;
  conversations.delete(conversation.id);
  if (conversation.id === current.id) discardCurrent();
  drawList();
  (at("list").querySelector("button") ?? at("new-chat")).focus();
}

function discardCurrent() {
  current.isDeleted = true;
  newChat();
}

function showChats(isOpen) {
  chats.hidden = !isOpen;
  at("show-chats").ariaExpanded = String(isOpen);
}

// --- Settings

function readSettings() {
  const empty = { temperature: "", top_p: "", max_tokens: "", stop: "", theme: "" };
  try {
    const stored = JSON.parse(storage.getItem(SETTINGS_KEY) ?? "{}");
    return Object.fromEntries(Object.keys(empty).map(name => [name, String(stored[name] ?? "")]));
  } catch {
    return empty;
  }
}

function changeSetting(name, value) {
  settings[name] = value;
  try {
    storage.setItem(SETTINGS_KEY, JSON.stringify(settings));
  } catch {
    // Full: the setting lasts until the page is closed.
  }
}

// The fields of a request; null leaves the choice to the server.
function sampling() {
  const numbers = SAMPLING.map(name => [name, at(name).value === "" ? null : Number(at(name).value)]);
  const stop = settings.stop.split("\n").filter(line => line).map(line => line.replaceAll("\\n", "\n"));
  return { ...Object.fromEntries(numbers), stop: stop.length ? stop : null };
}

// Whether the settings can be sent; if not, shows what is wrong.
function isValid() {
  const wrong = SAMPLING.map(at).find(field => !field.checkValidity());
  if (!wrong) return true;
  showSettings();
  wrong.reportValidity();
  return false;
}

const showSettings = () => at("settings").open || at("settings").showModal();

function showTheme() {
  document.documentElement.dataset.theme = settings.theme;
  at("dark").checked = settings.theme ? settings.theme === "dark" : isDark.matches;
}

// --- Start

async function open() {
  try {
    model = (await (await call("/v1/models")).json()).data[0];
    at("name").textContent = document.title = model.id;
    [unlock.hidden, ask.hidden] = [true, false];
    draw();
    question.focus();
  } catch (error) {
    if (error.status === 401) lock(key && "Invalid API key.");
    else note(error.message, "alert");
  }
}

function lock(message) {
  if (message) note(message, "alert");
  [unlock.hidden, ask.hidden] = [false, true];
  at("key").focus();
}

ask.addEventListener("submit", event => {
  event.preventDefault();
  send(question, current.messages, text => { question.value ||= text; });
});
sendOnEnter(question, ask);
question.addEventListener("keydown", event => {
  const last = current.messages.findLastIndex(({ role }) => role === "user");
  if (event.key !== "ArrowUp" || question.value || last < 0) return;
  event.preventDefault();
  edit(last);
});
unlock.addEventListener("submit", event => {
  event.preventDefault();
  key = at("key").value.trim();
  at("key").value = "";
  open();
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !at("settings").open) {
    if (pending) pending.abort();
    else if (!isWide.matches) showChats(false);
  }
  if (!event.ctrlKey && !event.metaKey) return;
  if (event.key === "/") {
    event.preventDefault();
    if (at("settings").open) at("settings").close();
    else showSettings();
  } else if (event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    newChat();
  }
});
at("stop").addEventListener("click", () => pending?.abort());
at("new-chat").addEventListener("click", newChat);
at("show-chats").addEventListener("click", () => showChats(chats.hidden));
at("show-settings").addEventListener("click", showSettings);
at("delete-all").addEventListener("click", () => {
  if (!confirm("Delete all chats that are kept in this browser?")) return;
  conversations.deleteAll();
  discardCurrent();
});
at("system").addEventListener("input", () => { current.system = at("system").value; });
at("system").addEventListener("change", () => keep(current));
for (const name of SAMPLING) at(name).addEventListener("input", () => changeSetting(name, at(name).value));
at("stop-strings").addEventListener("input", () => changeSetting("stop", at("stop-strings").value));
at("dark").addEventListener("change", ({ target }) => {
  changeSetting("theme", target.checked === isDark.matches ? "" : target.checked ? "dark" : "light");
  showTheme();
});
isDark.addEventListener("change", showTheme);
isWide.addEventListener("change", () => showChats(isWide.matches));
addEventListener("pagehide", () => pending && keep(current));  // the part of the answer that has been written
addEventListener("storage", ({ key }) => {  // another tab changed something
  if (!isConversationKey(key)) return;
  const stored = conversations.read().conversations.find(({ id }) => id === current.id);
  if (stored && stored.updated !== current.updated && !pending) {
    current = stored;
    at("system").value = current.system;
    draw();
  }
  drawList();
});

for (const name of SAMPLING) at(name).value = settings[name];
at("stop-strings").value = settings.stop;
showTheme();
showChats(isWide.matches);
const kept = conversations.read().conversations;
openConversation(kept.find(({ id }) => `#${id}` === location.hash) ?? current);
open();
