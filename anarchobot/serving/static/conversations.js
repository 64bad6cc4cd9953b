// Conversations kept in the browser's storage, one entry each, so that tabs do not overwrite each other's. An entry is
// {id, title, system, messages, density, updated}; a message {role, content} and, if it is an answer, its reasoning,
// notes and sources. What is stored is checked when it is read. Runs without a browser, on any object like `localStorage`.

export const MAX_CONVERSATIONS = 100;
export const MAX_CHARACTERS = 2_000_000;  // in all; browsers allow 2.5 to 5 million
const PREFIX = "anarchobot/conversation/";

export const newConversation = (system = "") => ({
  id: `${Date.now()}-${Math.random().toString(36).slice(2)}`,
  title: "",  // until it is renamed: its first question
  system,
  messages: [],
  density: 0,  // tokens per character, from the last answer
  updated: 0,
});

export function titleOf({ title, messages }) {
  return title || messages[0]?.content.trim().split("\n")[0].slice(0, 80) || "New chat";
}

export class Conversations {
  constructor(storage) {
    this.storage = storage;
  }

  // All conversations, newest first. `damaged` entries cannot be read: they are counted, and left as they are.
  read() {
    const conversations = [];
    let damaged = 0;
    for (const [key, text] of this.entries()) {
      const conversation = parse(text);
      if (conversation && key === PREFIX + conversation.id) conversations.push(conversation);
      else damaged++;
    }
    return { conversations: conversations.sort((a, b) => b.updated - a.updated), damaged };
  }

  // Deletes the oldest conversations to make room, and returns them. Throws if this one cannot be stored.
  save(conversation) {
    conversation.updated = Date.now();
    const key = PREFIX + conversation.id, text = JSON.stringify(conversation), deleted = [];
    if (text.length > MAX_CHARACTERS) throw new Error("This conversation is too long to be kept in the browser.");
    const others = this.entries().filter(([other]) => other !== key);
    let left = others.length, characters = others.reduce((sum, [, other]) => sum + other.length, text.length);
    const older = this.read().conversations.filter(({ id }) => id !== conversation.id);
    while ((left >= MAX_CONVERSATIONS || characters > MAX_CHARACTERS) && older.length) {
      const oldest = older.pop();
      characters -= this.storage.getItem(PREFIX + oldest.id).length;
      left--;
      this.delete(oldest.id);
      deleted.push(oldest);
    }
    try {
      this.storage.setItem(key, text);
    } catch {
      throw new Error("The browser's storage is full: this conversation is not kept. Delete some others.");
    }
    return deleted;
  }

  delete(id) {
    this.storage.removeItem(PREFIX + id);
  }

  // Deletes damaged ones, too.
  deleteAll() {
    for (const [key] of this.entries()) this.storage.removeItem(key);
  }

  entries() {
    const keys = Array.from({ length: this.storage.length }, (_, i) => this.storage.key(i));
    return keys.filter(key => key.startsWith(PREFIX)).map(key => [key, this.storage.getItem(key)]);
  }
}

export const isConversationKey = key => key === null || key.startsWith(PREFIX);  // null: everything was deleted

// The conversation in a stored text, or null. Unknown fields are left out.
function parse(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    return null;
  }
  const { id, title, system, messages, density, updated } = value ?? {};
  const valid = [id, title, system].every(isString) && [density, updated].every(Number.isFinite) &&
    Array.isArray(messages) && messages.length % 2 === 0 && messages.every(isMessage);
  return valid ? { id, title, system, messages, density, updated } : null;
}

const isString = value => typeof value === "string";
const isListOf = (value, test) => value === undefined || Array.isArray(value) && value.every(test);

function isMessage(message, i) {
  return message?.role === (i % 2 ? "assistant" : "user") && isString(message.content) &&
    isString(message.reasoning ?? "") && isListOf(message.notes, isString) && isListOf(message.sources, s => isString(s?.source) && isString(s.text));
}

// In place of `localStorage` where a browser allows none.
export class MemoryStorage {
  #items = new Map();
  get length() { return this.#items.size; }
  key(i) { return [...this.#items.keys()][i]; }
  getItem(key) { return this.#items.get(key) ?? null; }
  setItem(key, value) { this.#items.set(key, String(value)); }
  removeItem(key) { this.#items.delete(key); }
}
