// Markdown for the chat page. A text becomes a list of blocks, a block a tree of nodes ([tag, properties, ...children],
// where a child is a node or a string), and a node DOM elements and text. There is no HTML string on the way, so
// whatever a model writes stays text. A link is a link only if it leads to http or https.
//
// The syntax is CommonMark with tables and ~~strikethrough~~, without HTML, entities, link titles, reference links,
// setext headings and indented code. Images are links. Line breaks and leading spaces of a text are kept: the style
// sheet has `white-space: pre-wrap`. All functions but `toDom` run without a browser.

const MAX_DEPTH = 12;  // of lists and quotes inside one another; what is deeper is text
const MAX_OPEN = 50;  // emphasis and brackets that are open at once; further ones are text

const FENCE = /^ *(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)(.*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+(?=\S)|[ \t]*$)/;
const TABLE_RULE = /^ {0,3}\|?(?:[ \t]*:?-+:?[ \t]*\|)*(?:[ \t]*:?-+:?[ \t]*)?$/;

// --- Blocks

// The sources of a text's blocks, in order. When text is appended, only the last two can change.
export function split(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n"), sources = [];
  for (let i = 0; i < lines.length;) {
    const end = lines[i].trim() ? endOfBlock(lines, i) : i + 1;
    if (lines[i].trim()) sources.push(lines.slice(i, end).join("\n"));
    i = end;
  }
  return sources;
}

const parse = (text, depth) => split(text).map(source => parseBlock(source, depth));

// The node of one block, given its source.
export function parseBlock(source, depth = 0) {
  const lines = source.split("\n");
  if (depth > MAX_DEPTH) return ["p", {}, source];
  switch (kindOf(lines, 0)) {
    case "fence": return fence(lines);
    case "heading": return heading(lines[0]);
    case "rule": return ["hr", {}];
    case "quote": return ["blockquote", {}, ...parse(lines.map(line => line.replace(QUOTE, "")).join("\n"), depth + 1)];
    case "table": return table(lines);
    case "list": return list(lines, depth);
    default: return ["p", {}, ...inline(source)];
  }
}

function kindOf(lines, i) {
  const line = lines[i];
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  const next = lines[i + 1];
  if (line.includes("|") && next?.includes("|") && TABLE_RULE.test(next) && cells(line).length === cells(next).length)
    return "table";
  return "paragraph";
}

// The index of the line after the block that starts at line `first`.
function endOfBlock(lines, first) {
  let i = first + 1;
  const skip = belongs => { while (i < lines.length && belongs(lines[i])) i++; };
  switch (kindOf(lines, first)) {
    case "fence": {
      const closes = closesFence(lines[first]);
      skip(line => !closes(line));
      return Math.min(i + 1, lines.length);
    }
    case "heading": case "rule": return i;
    case "quote": skip(line => QUOTE.test(line)); return i;
    case "table": i++; skip(line => line.includes("|")); return i;
    case "list": return endOfList(lines, first);
    default: skip(line => line.trim() && !interrupts(lines, i)); return i;
  }
}

// Whether line i starts a block although it follows a paragraph. As in CommonMark, a number other than 1 does not.
function interrupts(lines, i) {
  const kind = kindOf(lines, i);
  if (kind !== "list") return kind !== "paragraph";
  const [all, , marker] = ITEM.exec(lines[i]);
  return all.length < lines[i].length && (!isNumber(marker) || parseInt(marker) === 1);
}

const isNumber = marker => marker.length > 1;
const typeOfList = line => ITEM.exec(line)[2].at(-1);  // - * + . or )

// The width of the white space at the start of a line.
function indentOf(line) {
  let width = 0;
  for (const c of line) {
    if (c !== " " && c !== "\t") break;
    width += c === " " ? 1 : 4 - width % 4;
  }
  return width;
}

// A line without up to `width` columns of white space at its start.
function outdent(line, width) {
  let i = 0;
  while (width > 0 && (line[i] === " " || line[i] === "\t")) width -= line[i++] === " " ? 1 : 4;
  return line.slice(i);
}

// A list goes on with lines indented by two or more, items of the same kind, and lines right below a paragraph.
function endOfList(lines, first) {
  const margin = indentOf(lines[first]), type = typeOfList(lines[first]);
  let end = first + 1;
  for (let i = end; i < lines.length; i++) {
    if (!lines[i].trim()) continue;
    const kind = kindOf(lines, i);
    const isItem = kind === "list" && typeOfList(lines[i]) === type;
    if (indentOf(lines[i]) < margin + 2 && !isItem && !(kind === "paragraph" && end === i)) break;
    end = i + 1;
  }
  return end;
}

function list(lines, depth) {
  const margin = indentOf(lines[0]), items = [];
  let width = 0;
  for (const line of lines) {
    const item = indentOf(line) < margin + 2 && kindOf([line], 0) === "list" && ITEM.exec(line);
    if (item) {
      width = indentOf(line) + item[0].length - item[1].length;
      items.push([line.slice(item[0].length)]);
    } else {
      items.at(-1).push(outdent(line, width));
    }
  }
  const marker = ITEM.exec(lines[0])[2];
  const [tag, properties] = isNumber(marker) ? ["ol", { start: parseInt(marker) }] : ["ul", {}];
  return [tag, properties, ...items.map(item => ["li", {}, ...parse(item.join("\n"), depth + 1)])];
}

function closesFence(opening) {
  const mark = FENCE.exec(opening)[1];
  return line => {
    const text = line.trim();
    return text.length >= mark.length && text === mark[0].repeat(text.length);
  };
}

function fence(lines) {
  const language = FENCE.exec(lines[0])[2].trim(), width = indentOf(lines[0]);
  const isClosed = lines.length > 1 && closesFence(lines[0])(lines.at(-1));
  const code = lines.slice(1, isClosed ? -1 : undefined).map(line => outdent(line, width));
  return ["pre", language ? { language } : {}, ["code", {}, code.join("\n")]];
}

// Level 1 is an h2: the page's own heading is above it.
function heading(line) {
  const [, marks, rest] = HEADING.exec(line);
  return [`h${Math.min(marks.length + 1, 6)}`, {}, ...inline(rest.trim().replace(/(^|\s)#+$/, "").trim())];
}

function cells(row) {
  const inner = row.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
}

function table([head, rule, ...rows]) {
  const align = cells(rule).map(mark => {
    const [left, right] = [mark.startsWith(":"), mark.endsWith(":")];
    return left && right ? { align: "center" } : right ? { align: "right" } : {};
  });
  const row = (tag, line) => ["tr", {}, ...cells(line).map((cell, i) => [tag, align[i] ?? {}, ...inline(cell)])];
  return ["table", {}, ["thead", {}, row("th", head)], ["tbody", {}, ...rows.map(line => row("td", line))]];
}

// --- Text inside a block

// Escapes, code, emphasis, images and links, ends of links, and addresses.
const TOKEN = /\\([!-/:-@[-`{-~\n])|`+|\*+|_+|~+|!?\[|\]|<https?:\/\/[^\s<>]+>|https?:\/\/[^\s<>"`[\]]+/gi;
const TARGET = /\(\s*<?(https?:\/\/[^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?\s*\)/iy;
const EMPHASIS = { "*": "em", "_": "em", "**": "strong", "__": "strong", "~~": "del" };

// The nodes and strings of a text.
export function inline(text) {
  // Open emphasis and brackets, innermost last, each with its mark and what follows it; the first is the text itself.
  const open = [{ mark: "", children: [] }];
  const add = (...nodes) => open.at(-1).children.push(...nodes);

  // Marks above `level` have no partner: they are text.
  function collapse(level) {
    for (const { mark, children } of open.splice(level + 1)) {
      open[level].children.push(mark);
      for (const child of children) open[level].children.push(child);
    }
  }

  function push(mark) {
    if (open.length > MAX_OPEN) add(mark);
    else open.push({ mark, children: [] });
  }

  function emphasis(run, before, after) {
    const isWord = character => /[\p{L}\p{N}]/u.test(character);
    const inside = run[0] === "_" && isWord(before) && isWord(after);  // snake_case
    const closes = /\S/.test(before) && !inside, opens = /\S/.test(after) && !inside;
    if (run.length > 3 || run[0] === "~" && run.length !== 2) return add(run);
    let left = run.length;
    while (closes && left) {
      const level = open.findLastIndex(({ mark }) => mark[0] === run[0]);
      if (level < 1) break;
      collapse(level);
      const { mark, children } = open.pop(), used = Math.min(mark.length, left) < 2 ? 1 : 2;
      const node = [EMPHASIS[mark.slice(0, used)], {}, ...joined(children)];
      if (mark.length > used) open.push({ mark: mark.slice(used), children: [node] });
      else add(node);
      left -= used;
    }
    if (opens && left) push(run.slice(0, left));
    else add(run.slice(0, left));
  }

  const closingRuns = partners(text);
  let end = 0;  // of what is done
  TOKEN.lastIndex = 0;
  for (let found; (found = TOKEN.exec(text));) {
    const [token, escaped] = found, start = found.index;
    add(text.slice(end, start));
    end = start + token.length;
    if (escaped !== undefined) {
      add(escaped);
    } else if (token[0] === "`") {
      const closing = closingRuns.get(start);
      if (closing === undefined) add(token);
      else {
        const code = text.slice(end, closing).replaceAll("\n", " ");
        add(["code", {}, code.startsWith(" ") && code.endsWith(" ") && code.trim() ? code.slice(1, -1) : code]);
        end = closing + token.length;
      }
    } else if ("*_~".includes(token[0])) {
      emphasis(token, text[start - 1] ?? " ", text[end] ?? " ");
    } else if (token === "[" || token === "![") {
      push(token);
    } else if (token === "]") {
      const level = open.findLastIndex(({ mark }) => mark.endsWith("["));
      TARGET.lastIndex = end;
      const target = level > 0 && TARGET.exec(text);
      if (target) {
        end = TARGET.lastIndex;
        collapse(level);
        const label = joined(withoutLinks(open.pop().children));
        add(["a", { href: target[1] }, ...label.length ? label : [target[1]]]);
      } else {
        if (level > 0) collapse(level - 1);
        add(token);
      }
    } else {
      const href = token[0] === "<" ? token.slice(1, -1) : withoutPunctuation(token);
      add(["a", { href }, href]);
      if (token[0] !== "<") end = start + href.length;
    }
    TOKEN.lastIndex = end;
  }
  add(text.slice(end));
  collapse(0);
  return joined(open[0].children);
}

// For each run of backticks, the index of the next run of the same length: between them is code.
function partners(text) {
  const runs = [...text.matchAll(/`+/g)], next = new Map(), found = new Map();
  for (const { index, 0: run } of runs.reverse()) {
    if (next.has(run.length)) found.set(index, next.get(run.length));
    next.set(run.length, index);
  }
  return found;
}

// Neighbouring strings as one.
function joined(nodes) {
  const result = [];
  let text = "";
  for (const node of nodes) {
    if (typeof node === "string") { text += node; continue; }
    if (text) result.push(text);
    text = "";
    result.push(node);
  }
  if (text) result.push(text);
  return result;
}

const withoutLinks = nodes => nodes.flatMap(node => {
  if (typeof node === "string") return [node];
  const [tag, properties, ...children] = node;
  return tag === "a" ? children : [[tag, properties, ...withoutLinks(children)]];
});

// An address without the punctuation of the sentence around it: a bracket belongs to it if it has its partner.
function withoutPunctuation(address) {
  let end = address.length, unmatched = 0;
  for (const c of address) unmatched += (c === ")") - (c === "(");
  for (; end; end--) {
    const last = address[end - 1];
    if (last === ")" ? unmatched-- <= 0 : !".,;:!?'*_~".includes(last)) break;
  }
  return address.slice(0, end);
}

// --- Output

const SEPARATORS = { tr: ", ", ...Object.fromEntries(
  ["ul", "ol", "li", "blockquote", "table", "thead", "tbody"].map(tag => [tag, "\n"])) };

// A node's text without marks, to be read aloud.
export function textOf(node) {
  if (typeof node === "string") return node;
  const [tag, , ...children] = node;
  return children.map(textOf).join(SEPARATORS[tag] ?? "");
}

export function toDom(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const [tag, { href, start, align, language }, ...children] = node;
  const element = document.createElement(tag);
  if (href && /^https?:\/\//i.test(href))
    Object.assign(element, { href, title: href, target: "_blank", rel: "noopener noreferrer" });
  if (start !== undefined) element.start = start;
  if (align) element.className = align;
  if (language) element.dataset.language = language;
  for (const child of children) element.append(toDom(child));
  return element;
}
