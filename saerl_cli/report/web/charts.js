// --- charts: SVG by hand, read with the pointer or the arrow keys -------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8;

function svg(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

/** Round numbers over a range, about so many. */
function ticks(low, high, about) {
  const raw = (high - low) / about, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * size >= raw) * size;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

const SCALES = {
  linear: { to: (x) => x, ticks },
  log1p: {  // counts from 0 on
    to: (x) => Math.log10(1 + x),
    ticks: (low, high) => [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 1e5].filter((t) => t >= low && t <= high)
      .filter((t, i, all) => all.length < 8 || t === 0 || Math.log10(t) % 1 === 0),
  },
};

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-4)) return value.toExponential(0);
  return size >= 1e4 ? `${Number((value / 1000).toPrecision(4))}k` : String(Number(value.toPrecision(6)));
}

function colour(part) {
  return part.colour === "neutral" ? "var(--neutral)" : `var(--c${part.colour % COLOURS})`;
}

function dash(part) {
  return part.dash || (part.colour === "neutral" ? "" : ["", "6 3", "2 3"][Math.floor(part.colour / COLOURS) % 3]);
}

/** Buttons that put names into the set `hidden` and out of it, for one chart or several. */
function legend(series, hidden, redraw) {
  const entries = new Map();
  for (const part of series) if (part.legend && !entries.has(part.legend)) entries.set(part.legend, { part, runs: 0 });
  for (const part of series) if (part.legend && !part.silent && !part.mean) entries.get(part.legend).runs += 1;
  if (entries.size < 2) return null;
  const press = (button, name) => button.setAttribute("aria-pressed", String(!hidden.has(name)));
  const buttons = [...entries].map(([name, { part, runs }]) => {
    const form = dash(part), kind = part.line === false && part.colour === "neutral" ? "cross" : form ? (form.startsWith("2") ? "dot" : "dash") : "";
    const swatch = el("i", { class: kind, style: `${kind === "cross" ? "color" : "border-color"}:${colour(part)}`, "aria-hidden": "true" }, kind === "cross" ? "×" : "");
    const button = el("button", { type: "button", "aria-pressed": "true", click: toggle }, swatch, runs > 1 && part.colour !== "neutral" ? `${name} (${runs})` : name);
    function toggle() {
      if (!hidden.delete(name)) hidden.add(name);
      press(button, name);
      redraw();
    }
    return [button, name];
  });
  const all = el("button", { type: "button", click: () => {
    const hide = hidden.size === 0;
    hidden.clear();
    if (hide) for (const name of entries.keys()) hidden.add(name);
    for (const [button, name] of buttons) press(button, name);
    redraw();
  } }, "all / none");
  return el("div", { class: "legend", role: "group", "aria-label": "Curves shown" }, ...buttons.map(([button]) => button), buttons.length > 4 ? all : null);
}

/**
 * A chart of series {name, legend, colour (0.. or "neutral"), points: [{x, y, lines, xe, ye, half, tag}], line, dash, marks,
 * faint, silent}. `lines` is what the tip says of a point. Series of one `legend` are toggled together.
 */
function chart({ series, x, y, label, scale = "linear", height = 300, shared = null }) {
  const hidden = shared || new Set(), box = el("div", { class: "chart" }), tip = el("div", { class: "tip", role: "status", "aria-live": "polite" });
  let picture = null, place = null, focus = null, last = 0;
  const root = el("div", {}, shared ? null : legend(series, hidden, () => draw()), box);
  new ResizeObserver(() => { if (Math.abs(box.clientWidth - last) > 1) draw(); }).observe(box);

  function visible() {
    return series.filter((part) => part.points.length && !hidden.has(part.legend));
  }
  function draw() {
    last = box.clientWidth;
    if (!last) return;
    const parts = visible(), W = last, H = height, bottom = 40, top = 10, right = 12;
    const extent = (get) => {
      let low = Infinity, high = -Infinity;
      for (const part of parts) for (const p of part.points) for (const v of get(p)) { if (v < low) low = v; if (v > high) high = v; }
      if (!(low <= high)) return [0, 1];
      if (low === high) return [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
      return [low, high];
    };
    let [x0, x1] = extent((p) => [Math.max(p.x - (p.xe || 0), Math.min(0, p.x)), p.x + (p.xe || 0)]), [y0, y1] = extent((p) => [p.y - (p.ye || 0), p.y + (p.ye || 0)]);
    const pad = 0.04 * (y1 - y0), to = SCALES[scale].to;
    y0 -= pad; y1 += pad;
    const rungs = ticks(y0, y1, 5), left = 26 + 7 * Math.max(...rungs.map((t) => tickText(t).length));
    const px = (v) => left + ((to(v) - to(x0)) / (to(x1) - to(x0))) * (W - left - right);
    const py = (v) => H - bottom - ((v - y0) / (y1 - y0)) * (H - bottom - top);
    place = { px, py, W, H };
    const hint = "Arrow keys: left and right along a curve, up and down between curves.";
    picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, height: H, tabindex: 0, role: "application", "aria-roledescription": "chart", "aria-label": `${label}. ${hint}` });
    for (const t of rungs) {
      picture.append(svg("line", { class: "grid", x1: left, x2: W - right, y1: py(t), y2: py(t) }));
      picture.append(svg("text", { x: left - 7, y: py(t) + 4, "text-anchor": "end" }, tickText(t)));
    }
    for (const t of SCALES[scale].ticks(x0, x1, Math.max(3, W / 110))) {
      picture.append(svg("line", { class: "grid", x1: px(t), x2: px(t), y1: top, y2: H - bottom }));
      picture.append(svg("text", { x: px(t), y: H - bottom + 17, "text-anchor": "middle" }, tickText(t)));
    }
    picture.append(svg("line", { class: "axis", x1: left, x2: W - right, y1: H - bottom, y2: H - bottom }));
    picture.append(svg("text", { class: "title", x: (left + W - right) / 2, y: H - 6, "text-anchor": "middle" }, x));
    picture.append(svg("text", { class: "title", x: -(top + H - bottom) / 2, y: 11, "text-anchor": "middle", transform: "rotate(-90)" }, y));
    for (const part of parts) paint(part, px, py);
    const ring = svg("circle", { class: "ring", r: 5, visibility: "hidden" });
    picture.append(ring);
    picture.addEventListener("pointermove", (event) => point(event, ring));
    picture.addEventListener("pointerdown", (event) => point(event, ring));
    picture.addEventListener("pointerleave", () => leave(ring));
    picture.addEventListener("blur", () => leave(ring));
    picture.addEventListener("keydown", (event) => key(event, ring));
    const held = document.activeElement === box.firstChild;
    box.replaceChildren(picture, tip);
    if (held) picture.focus();
  }
  function paint(part, px, py) {
    const group = svg("g", { style: `stroke:${colour(part)};fill:none`, opacity: part.faint ? 0.35 : series.length > 40 ? 0.6 : 1 });
    const at = (p) => `${px(p.x).toFixed(1)},${py(p.y).toFixed(1)}`;
    if (part.points.some((p) => p.half)) {
      const high = part.points.map((p) => at({ x: p.x, y: p.y + p.half })), low = part.points.map((p) => at({ x: p.x, y: p.y - p.half })).reverse();
      group.append(svg("polygon", { points: [...high, ...low].join(" "), style: `fill:${colour(part)};stroke:none;opacity:.13` }));
    }
    if (part.line !== false && part.points.length > 1) {
      group.append(svg("polyline", { points: part.points.map(at).join(" "), "stroke-width": part.width || (series.length > 40 ? 1 : 1.7), "stroke-dasharray": dash(part), "stroke-linejoin": "round" }));
    }
    for (const p of part.points) {
      const X = px(p.x), Y = py(p.y);
      if (p.xe) group.append(svg("line", { x1: px(Math.max(0, p.x - p.xe)), x2: px(p.x + p.xe), y1: Y, y2: Y, "stroke-width": 1 }));
      if (p.ye) group.append(svg("line", { x1: X, x2: X, y1: py(p.y - p.ye), y2: py(p.y + p.ye), "stroke-width": 1 }));
      if (part.marks === "cross") group.append(svg("path", { d: `M${X - 4},${Y - 4}l8,8m0,-8l-8,8`, "stroke-width": 1.4 }));
      else if (part.marks || part.points.length === 1) group.append(svg("circle", { cx: X, cy: Y, r: part.small ? 2 : 3.2, style: `fill:${colour(part)};stroke:none` }));
      if (p.tag) group.append(svg("text", { x: X + 6, y: Y + 12, style: "stroke:none" }, p.tag));
    }
    picture.append(group);
  }
  function point(event, ring) {
    const bounds = picture.getBoundingClientRect(), X = event.clientX - bounds.left, Y = event.clientY - bounds.top;
    let best = null, least = 60 ** 2;
    for (const part of visible()) {
      if (part.silent) continue;
      part.points.forEach((p, i) => {
        const d = (place.px(p.x) - X) ** 2 + (place.py(p.y) - Y) ** 2;
        if (d < least) { least = d; best = [part, i]; }
      });
    }
    if (best) show(best, ring);
    else leave(ring);
  }
  function key(event, ring) {
    const parts = visible().filter((part) => !part.silent), keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"];
    if (event.key === "Escape") leave(ring);
    if (!keys.includes(event.key) || !parts.length) return;
    event.preventDefault();
    let [part, i] = focus && parts.includes(focus[0]) ? focus : [parts[0], -1];
    if (event.key === "ArrowRight") i = Math.min(i + 1, part.points.length - 1);
    else if (event.key === "ArrowLeft") i = Math.max(i - 1, 0);
    else if (event.key === "Home") i = 0;
    else if (event.key === "End") i = part.points.length - 1;
    else {
      const here = part.points[Math.max(i, 0)].x, step = event.key === "ArrowDown" ? 1 : -1;
      part = parts[(parts.indexOf(part) + step + parts.length) % parts.length];
      i = part.points.reduce((near, p, j) => (Math.abs(p.x - here) < Math.abs(part.points[near].x - here) ? j : near), 0);
    }
    show([part, i], ring);
  }
  function show([part, i], ring) {
    focus = [part, i];
    const p = part.points[i], X = place.px(p.x), Y = place.py(p.y);
    ring.setAttribute("cx", X);
    ring.setAttribute("cy", Y);
    ring.setAttribute("style", `stroke:${colour(part)}`);
    ring.setAttribute("visibility", "visible");
    tip.replaceChildren(el("b", {}, part.name), ...p.lines.map((line) => el("div", {}, line)));
    const side = X > place.W / 2;
    tip.style.left = side ? "auto" : `${X + 12}px`;
    tip.style.right = side ? `${place.W - X + 12}px` : "auto";
    tip.style.top = `${Math.max(0, Y - 30)}px`;
  }
  function leave(ring) {
    ring.setAttribute("visibility", "hidden");
    tip.replaceChildren();
  }
  root.redraw = draw;
  return root;
}
