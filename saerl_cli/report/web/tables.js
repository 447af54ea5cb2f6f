"use strict";

// --- building blocks: all text goes through textContent, whoever wrote it ----------------------------------------------

/** An element: el("p", {class: "soft"}, "text", child, ...); functions become listeners. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A number as text: form is int, number, share or text. */
function format(value, form = "number") {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value !== "number") return String(value);
  if (form === "share") return (100 * value).toFixed(Math.abs(value) < 0.1 ? 2 : 1) + " %";
  if (form === "int" || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
}

/** A command with a button that copies it. */
function command(text, what) {
  if (!text) return null;
  const button = el("button", { type: "button", "aria-label": `Copy the command: ${what}`, click: copy }, "Copy");
  async function copy() {
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = el("textarea", { style: "position:fixed;opacity:0" });
      area.value = text;
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.textContent = done ? "Copied" : "Select and copy by hand";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  }
  return el("div", { class: "command" }, button, el("code", { tabindex: 0, "aria-label": what }, text));
}

/** A labelled choice. */
function choice(label, options, change) {
  const select = el("select", { change: () => change(Number(select.value)) });
  options.forEach((option, i) => select.append(el("option", { value: i }, option)));
  return el("label", {}, label, select);
}

// --- tables ------------------------------------------------------------------------------------------------------------

/**
 * A sortable table, searched and paged where it is long; only the page that is seen is in the document.
 *
 * columns: {label, help, form, get(i) -> sort value, cell(i) -> node or text (by default the formatted value), wide}
 */
function table({ name, caption, columns, count, page = 50, search = null, first = null, sort = null, changed = null }) {
  let order = Int32Array.from({ length: count }, (_, i) => i), shown = order, at = 0, by = null, down = true;
  const body = el("tbody"), heads = columns.map(head), status = el("span", { role: "status" });
  const back = el("button", { type: "button", click: () => turn(-1) }, "Previous");
  const on = el("button", { type: "button", click: () => turn(1) }, "Next");
  const pager = el("div", { class: "pager" }, back, on, status);
  const note = `note-${table.count = (table.count || 0) + 1}`;  // beside the table, which may be wider than the window
  const box = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": name },
    el("table", { "aria-describedby": note }, el("caption", { class: "visually-hidden" }, name), el("thead", {}, el("tr", {}, ...heads)), body));
  const root = el("div", {}, el("p", { class: "note soft", id: note }, caption), search && finder(), box, pager);

  function head(column, i) {
    const button = el("button", { type: "button", title: column.help || false, click: () => sortBy(i) }, column.label);
    return el("th", { scope: "col", class: numeric(column) ? "n" : false, "aria-sort": "none" }, button);
  }
  function numeric(column) {
    return column.form && column.form !== "text";
  }
  function finder() {
    const input = el("input", { type: "search", placeholder: search.placeholder || "", input: () => find(input.value) });
    return el("div", { class: "controls" }, el("label", {}, search.label, input));
  }
  function find(words) {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    shown = wanted.length ? order.filter((i) => { const text = search.text(i); return wanted.every((w) => text.includes(w)); }) : order;
    find.words = words;
    at = 0;
    draw();
  }
  function sortBy(i, forced = null) {
    down = forced === null ? (by === i ? !down : numeric(columns[i])) : forced;
    by = i;
    const get = columns[i].get, sign = down ? -1 : 1;
    const keys = Array.from({ length: count }, (_, row) => get(row));
    order = Int32Array.from({ length: count }, (_, row) => row).sort((a, b) => {
      const x = keys[a], y = keys[b], none = (v) => v === null || v === undefined || v === "";
      if (none(x) || none(y)) return none(x) - none(y) || a - b;  // what is not there comes last, up or down
      return (typeof x === "string" || typeof y === "string" ? String(x).localeCompare(String(y)) : x - y) * sign || a - b;
    });
    heads.forEach((th, j) => th.setAttribute("aria-sort", j === i ? (down ? "descending" : "ascending") : "none"));
    find(find.words || "");
  }
  function turn(by_) {
    at += by_ * page;
    draw();
  }
  function cells(i) {
    return columns.map((column, j) => {
      const content = column.cell ? column.cell(i) : format(column.get(i), column.form);
      const kind = numeric(column) ? "n" : column.wide ? "w" : false;
      return j === 0 ? el("th", { scope: "row" }, content) : el("td", { class: kind }, content);
    });
  }
  function draw() {
    const rows = Array.from(shown.slice(at, at + page));
    body.replaceChildren(...rows.map((i) => el("tr", {}, ...cells(i))));
    back.disabled = at === 0;
    on.disabled = at + page >= shown.length;
    const total = shown.length.toLocaleString("en");
    status.textContent = shown.length ? `${at + 1}–${Math.min(at + page, shown.length)} of ${total}` : "nothing found";
    pager.hidden = count <= page && !(search && shown.length < count);
    if (changed) changed(rows);
  }
  if (sort !== null) sortBy(sort, first);
  else draw();
  return root;
}

/** "before → after", the second in full ink. */
function pair(before, after, form, half = null) {
  if (before === null || before === undefined) return interval(after, half, form);
  return el("span", {}, el("span", { class: "half" }, format(before, form)), el("span", { class: "arrow" }, " → "), interval(after, half, form));
}

/** A value with half its interval. */
function interval(value, half, form) {
  if (value === null || value === undefined || half === null || half === undefined) return format(value, form);
  return el("span", {}, format(value, form), el("span", { class: "half" }, ` ± ${format(half, form)}`));
}
