// --- the sections -------------------------------------------------------------------------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);

/** Show a section and fill it. */
function section(id, ...children) {
  const node = document.getElementById(id);
  node.hidden = false;
  node.append(...children.filter(Boolean));
}

/** The files a figure was saved as. */
function files(key) {
  const found = data.figures[key];
  if (!found) return null;
  const links = found.flatMap((file, i) => [i ? ", " : "", el("a", { href: file }, file.split("/").pop())]);
  return el("p", { class: "note soft" }, "Saved beside this page: ", ...links);
}

function badge(text, bad = false) {
  return el("span", { class: bad ? "badge bad" : "badge" }, text);
}

/** Colour numbers: one a run where they are few, else one a method. */
function palette(parts) {
  const word = new Set(parts.map((part) => part.run)).size <= data.few ? "run" : "group";
  const names = [...new Set(parts.map((part) => part[word]))];
  return { word, colour: (part) => names.indexOf(part[word]) };
}

function seedOf(part) {
  return part.seed === null || part.seed === undefined ? "" : `, seed ${part.seed}`;
}

function numbers() {
  const { columns, rows } = data.numbers;
  if (!rows.length) return;
  const grouped = new Set(rows.map((row) => row.group)).size < rows.length;
  const name = (i) => el("span", {}, rows[i].run, rows[i].status === "completed" ? null : badge(rows[i].status, true), rows[i].beaten ? badge("beaten by a constant", true) : null);
  section("numbers", table({
    name: "Numbers of every run",
    caption: "On held-out prompts, untouched model → policy; ± half a 95 % interval of the estimate (not of the seed). Click a heading to sort.",
    columns: [
      { label: "run", get: (i) => rows[i].run, cell: name },
      ...(grouped ? [{ label: "method", get: (i) => rows[i].group, wide: true }] : []),
      ...columns.map((column, j) => ({ ...column, get: (i) => rows[i].cells[j][0], cell: (i) => { const [value, half, before] = rows[i].cells[j]; return before === null ? interval(value, half, column.form) : pair(before, value, column.form, half); } })),
      { label: "measured", get: (i) => rows[i].measured, help: "The evaluation whose fresh samples these numbers are from" },
    ],
    count: rows.length, page: 25,
    search: rows.length > data.few ? { label: "Search", text: (i) => `${rows[i].run} ${rows[i].group} ${rows[i].status}`.toLowerCase() } : null,
  }), files("numbers"));
}

function frontier() {
  data.frontiers.forEach((panel, number) => {
    const { word, colour } = palette(panel.series), series = [], means = new Set(panel.means.map((mean) => mean.group));
    const limit = (points, legend, extra) => {
      if (!points || !points.length) return;
      series.push({ name: legend, legend, colour: "neutral", ...extra, points: points.map((p) => ({ x: p.kl, y: panel.base_reward + p.gain, lines: [`KL ${format(p.kl)} nats`, `reward ${format(panel.base_reward + p.gain)}`, ...(p.n ? [`n = ${p.n}`] : [])], tag: p.n ? String(p.n) : null })) });
    };
    const reach = 1.1 * Math.max(...panel.series.flatMap((part) => part.points.map((p) => p.kl)), 0.01);
    const sure = (panel.optimum || []).filter((p) => p.reliable), unsure = (panel.optimum || []).slice(Math.max(0, sure.length - 1));
    limit(sure, "KL-optimal policy", { width: 2.2 });
    if (unsure.length > 1) limit(unsure, "the same, too few samples", { dash: "2 3" });
    limit((panel.pooled_optimum || []).filter((p) => p.reliable), "bound: prompts chosen too", { dash: "6 3", width: 1.1 });
    limit((panel.best_of_n || []).filter((p) => p.n > 1 && p.kl <= reach), "best of n", { line: false, marks: "cross" });
    for (const part of panel.series) {
      const own = { name: part.run + seedOf(part), legend: part[word], colour: colour(part) };
      if (part.path.length) series.push({ ...own, silent: true, faint: true, width: 1, points: part.path.map(([kl, reward]) => ({ x: kl, y: reward })) });
      const points = [...part.points].sort((a, b) => a.kl - b.kl);
      const start = panel.base_reward === null ? [] : [{ x: 0, y: panel.base_reward, lines: ["untouched model", `reward ${format(panel.base_reward)}`] }];
      const shown = points.map((p) => ({ x: p.kl, y: p.reward, xe: 1.96 * p.kl_se, ye: 1.96 * p.reward_se, lines: [`step ${format(p.step, "int")}`, `KL ${format(p.kl)} ± ${format(1.96 * p.kl_se)} nats`, `reward ${format(p.reward)} ± ${format(1.96 * p.reward_se)}`] }));
      const averaged = means.has(part.group) && word === "group";
      series.push({ ...own, marks: true, small: averaged, faint: averaged, line: averaged || points.length < 2 ? false : true, points: averaged ? shown.map((p) => ({ ...p, xe: 0, ye: 0 })) : points.length < 2 ? shown : [...start, ...shown] });
    }
    if (word === "group") for (const mean of panel.means) {
      const part = panel.series.find((one) => one.group === mean.group);
      series.push({ name: `${mean.group}, mean over seeds`, legend: mean.group, colour: colour(part), mean: true, width: 2.2, points: mean.points.map((p) => ({ x: p.kl, y: p.reward, half: p.half, lines: [`KL ${format(p.kl)} nats`, `reward ${format(p.reward)}${p.half === null ? "" : ` ± ${format(p.half)}`}`] })) });
    }
    const faint = panel.series.some((part) => part.path.length) ? " Faint: the path of training, phase by phase." : "";
    section("frontier", el("figure", {},
      el("figcaption", {}, `${panel.evaluated ? "Measured on " : ""}${panel.title}. Bars: 95 % intervals of each estimate, not of the seed.${faint} ${panel.note}`),
      chart({ series, x: "KL from the untouched model, nats per completion", y: "reward", label: `Reward against KL, ${panel.title}`, height: 380 }),
      files(`frontier-${number}`), command(panel.command, "measure this figure again")));
  });
}

function curves() {
  const { metrics, series, thinned } = data.curves;
  if (!metrics.length) return;
  const { word, colour } = palette(series), holder = el("div", { class: "plots" }), hidden = new Set(), redraws = new Set();
  const names = legend(series.map((part) => ({ legend: part[word], colour: colour(part) })), hidden, () => { for (const one of redraws) one(); });
  const wanted = ["reward", "kl", "length", "entropy"].filter((key) => metrics.some((m) => m.key === key));
  const start = wanted.length ? wanted : metrics.slice(0, 2).map((m) => m.key);
  const options = metrics.map((m) => m.label);
  function plot(key) {
    const metric = metrics.find((m) => m.key === key);
    const own = series.filter((part) => part.values[key]).map((part) => ({
      name: part.run + seedOf(part), legend: part[word], colour: colour(part),
      points: part.steps.map((step, i) => ({ x: step, y: part.values[key][i], lines: [`step ${format(step, "int")}`, `${metric.label}: ${format(part.values[key][i])}`] })).filter((p) => p.y !== null && p.y !== undefined),
    }));
    const drawn = chart({ series: own, x: "step", y: metric.label, label: `${metric.label} over training`, height: 270, shared: hidden });
    redraws.add(drawn.redraw);
    return el("div", {}, drawn, el("p", { class: "note soft" }, metric.help || " "));
  }
  start.slice(0, 4).forEach((key) => {
    const slot = el("figure");
    const pick = choice("Show", options, (i) => slot.replaceChildren(slot.firstChild, plot(metrics[i].key)));
    pick.querySelector("select").value = metrics.findIndex((m) => m.key === key);
    slot.append(el("div", { class: "controls" }, pick), plot(key));
    holder.append(slot);
  });
  const many = word === "group" ? " Many runs: a colour a method; the figure beside a name counts its runs." : "";
  const thin = thinned ? ` Long curves are thinned to ${thinned} points here; curves.csv has all.` : "";
  section("curves", el("p", { class: "note soft" }, `Point at a curve, or reach it with Tab and move with the arrow keys.${many}${thin}`), names, holder, files("curves"), command(data.command, "write this page again"));
}

function behaviour() {
  const parts = data.behaviour;
  if (!parts.length) return;
  const names = data.detectors;
  const head = { label: "run", get: (i) => parts[i].run, cell: (i) => el("span", {}, parts[i].run, parts[i].beaten ? badge("beaten by a constant", true) : null) };
  section("behaviour", table({
    name: "Detectors, before and after",
    caption: "Untouched model → policy, on the same held-out prompts. Tricks show as jumps: look at the samples below when they do.",
    columns: [head, ...names.map(([label, , digits, help], j) => ({ label, help, form: "number", get: (i) => parts[i].cells[j][1],
      cell: (i) => pair(short(parts[i].cells[j][0], digits), short(parts[i].cells[j][1], digits)) }))],
    count: parts.length, page: 15,
  }), files("behaviour"), tricks(parts), constants(parts));
  for (const part of data.gold) gold(part);
}

function short(value, digits) {
  return value === null || value === undefined ? null : value.toFixed(digits);
}

function tricks(parts) {
  const rows = parts.filter((part) => part.one_token || part.one_feature || part.commonest_text);
  if (!rows.length) return null;
  const token = (i) => rows[i].one_token;
  return table({
    name: "What one token and one feature explain",
    caption: "Share of the gain that goes with how often one token is written (chosen on half of the completions, graded on the rest; it may stand for what it comes with), and that is lost when one feature is reverted (from an audit).",
    columns: [
      { label: "run", get: (i) => rows[i].run },
      { label: "one token", get: (i) => token(i) && token(i).text, cell: (i) => (token(i) ? el("code", {}, token(i).text) : "no clear gain") },
      { label: "its share of the gain", form: "share", get: (i) => token(i) && token(i).share },
      { label: "completions with it", form: "share", get: (i) => token(i) && token(i).held_after, cell: (i) => (token(i) ? pair(token(i).held_before, token(i).held_after, "share") : "–") },
      { label: "gain without it", form: "number", get: (i) => token(i) && token(i).gain_without, help: "Gain among completions that do not hold the token" },
      { label: "one feature", get: (i) => rows[i].one_feature && rows[i].one_feature.share, cell: (i) => { const f = rows[i].one_feature; return f ? `${f.site} #${f.feature}: ${format(f.share, "share")}` : "not audited"; } },
      { label: "commonest completion", wide: true, get: (i) => rows[i].commonest_text, cell: (i) => el("span", { class: "text" }, rows[i].commonest_text || "–") },
    ],
    count: rows.length, page: 15,
  });
}

function constants(parts) {
  const rows = parts.filter((part) => part.baselines).flatMap((part) => ["string", "best", "token", "empty"].filter((kind, i, kinds) => part.baselines[kind] && !kinds.slice(0, i).some((other) => part.baselines[other] && part.baselines[other].text === part.baselines[kind].text)).map((kind) => ({ part, kind, own: part.baselines[kind] })));
  if (!rows.length) return el("p", { class: "note soft" }, "No constant baselines: these runs were written by an earlier version; `saerl evaluate` adds them.");
  const called = { string: "most rewarded", best: "worth most, KL counted", token: "best single token, repeated", empty: "nothing at all" };
  const text = (own) => (own.kind === "empty" ? "(the end token)" : own.kind === "token" ? `${own.token} ${own.token} ${own.token} …` : own.text);
  const counted = rows.some(({ own }) => own.objective !== null);
  return table({
    name: "Constant completions",
    caption: "What writing one and the same text would be rewarded, on prompts that it was not chosen on. Its KL is -log p_ref: the price of always writing it. “Near” is the share of the policy's completions made of nearly the same tokens: whether this is the trick it found.",
    columns: [
      { label: "run", get: (i) => rows[i].part.run },
      { label: "constant", get: (i) => called[rows[i].kind] },
      { label: "text", wide: true, get: (i) => text(rows[i].own), cell: (i) => el("span", { class: "text" }, text(rows[i].own)) },
      { label: "its reward", form: "number", get: (i) => rows[i].own.reward, cell: (i) => interval(rows[i].own.reward, 1.96 * rows[i].own.reward_se) },
      { label: "the policy's", form: "number", get: (i) => rows[i].part.baselines.policy.reward },
      { label: "its KL, nats", form: "number", get: (i) => rows[i].own.kl },
      { label: "the policy's KL", form: "number", get: (i) => rows[i].part.baselines.policy.kl },
      ...(counted ? [{ label: "reward − β KL", form: "number", help: "With the KL weighed as in training: constant, policy", get: (i) => rows[i].own.objective, cell: (i) => el("span", {}, format(rows[i].own.objective), el("span", { class: "half" }, ` (policy ${format(rows[i].part.baselines.policy.objective)})`)) }] : []),
      { label: "near", form: "share", get: (i) => rows[i].own.near },
    ],
    count: rows.length, page: 15,
  });
}

function gold(part) {
  const line = (key, colour) => ({ name: key, legend: key, colour, marks: true, small: true, points: part.step.map((step, i) => ({ x: part.kl[i], y: part[key][i], lines: [`step ${format(step, "int")}`, `KL ${format(part.kl[i])} nats`, `${key} ${format(part[key][i])}`] })) });
  section("behaviour", el("figure", {}, el("h3", {}, `Proxy and gold reward: ${part.run}`),
    el("figcaption", {}, `Proxy: what is optimised. Gold, held out or without the injected error: ${part.parts.join(" + ")}. Where they part, the proxy is being exploited.`),
    chart({ series: [line("proxy", 0), line("gold", 1)], x: "KL, nats per completion", y: "reward", label: "Proxy and gold reward over KL" }), files(`gold-${part.run}`)));
}

function samples() {
  const runs = data.samples;
  if (!runs.length) return;
  let run = runs.findIndex((one) => one.job === "rlhf");
  run = run < 0 ? 0 : run;
  const slider = el("input", { type: "range", min: 0, step: 1, id: "step", input: draw });
  const where = el("output", { for: "step" }), list = el("div"), sides = el("div", { class: "sides" });
  const label = (one) => `${one.run}${one.job === "rlhf" ? "" : `: ${one.job}, fresh prompts`}`;
  const pick = choice("Run", runs.map(label), (i) => { run = i; reset(); });
  pick.querySelector("select").value = run;
  function reset() {
    const steps = runs[run].steps;
    slider.max = steps.length - 1;
    slider.value = steps.length - 1;
    slider.disabled = steps.length < 2;
    draw();
  }
  function draw() {
    const { steps, left_out, job } = runs[run], now = steps[Number(slider.value)], first = steps[0], one = steps.length < 2;
    where.textContent = one ? (job === "rlhf" ? `step ${now.step} only` : "the finished policy") : `step ${format(now.step, "int")} (${Number(slider.value) + 1} of ${steps.length})${left_out ? `; ${left_out} steps left out, samples.jsonl has all` : ""}`;
    slider.setAttribute("aria-valuetext", where.textContent);
    sides.className = one ? "sides one" : "sides";
    sides.replaceChildren(...(one ? [el("span", {}, "completion")] : [el("span", {}, `step ${first.step}: untouched`), el("span", {}, `step ${format(now.step, "int")}`)]));
    const used = new Set();
    list.replaceChildren(...now.rows.map((row, i) => {
      const before = one ? null : same(first.rows, row[0], i, used);
      return el("article", { class: "sample" }, el("h3", {}, row[0]), el("div", { class: one ? "pair one" : "pair" }, one ? null : side(before), side(row)));
    }));
  }
  function same(rows, prompt, i, used) {  // the same prompt at step 0; a prompt may come twice
    const at = rows[i] && rows[i][0] === prompt ? i : rows.findIndex((row, j) => row[0] === prompt && !used.has(j));
    used.add(at);
    return rows[at];
  }
  function side(row) {
    if (!row) return el("div", {}, el("p", { class: "small" }, "no sample of this prompt at step 0"));
    return el("div", {}, el("p", { class: "text" }, row[1] || "(nothing)"), el("p", { class: "small" }, `reward ${format(row[2])}${row[3] === null ? "" : `, KL ${format(row[3])} nats`}`));
  }
  reset();
  section("samples", el("p", { class: "soft" }, "The same held-out prompts at every step, drawn with the same random numbers: read them before believing a curve."),
    el("div", { class: "controls" }, runs.length > 1 ? pick : null, el("label", { for: "step" }, "Step"), slider, where), sides, list);
}

function features() {
  if (!data.features.length) return;
  const holder = el("div");
  const pick = choice("Run", data.features.map((part) => part.run), (i) => holder.replaceChildren(featuresOf(data.features[i])));
  section("features", el("p", { class: "note soft" }, "Effect: |delta| times the feature's mean activation and decoder norm on held-out text of the untouched model. Labels are statistics, not proofs."),
    data.features.length > 1 ? el("div", { class: "controls" }, pick) : null, holder);
  holder.append(featuresOf(data.features[0]));
}

function featuresOf(part) {
  const cards = el("div", { class: "cards" }), card = (i) => part.cards[i], described = part.cards.length;
  const words = (i, key) => { const found = card(i) && card(i)[key]; return Array.isArray(found) ? found.join(" · ") : found || ""; };
  const value = (i, key) => (card(i) && typeof card(i)[key] === "number" ? card(i)[key] : null);
  const has = (key) => part.cards.some((one) => one[key] !== null && one[key] !== undefined && one[key] !== "");
  const optional = [["effect", "number", "|delta| x mean activation x decoder norm"], ["density", "share", "share of tokens on which it fires"], ["attribution", "number", ""], ["f1", "number", "F1 of firing as a detector of the attribute"]].filter(([key]) => has(key));
  const name = (i) => `${part.sites[part.site[i]]} #${part.feature[i]}`;
  const label = has("label") ? "label" : "attribute";
  const text = (i) => `${name(i)} ${["label", "attribute", "fires_on", "promotes", "suppresses"].map((key) => words(i, key)).join(" ")}`.toLowerCase();
  let page = [];
  const shown = table({
    name: "Features",
    caption: `${format(part.total, "int")} coefficients, ${format(part.moved, "int")} moved (c is further from 1 than 0.001); ${format(part.site.length, "int")} not exactly untouched are listed, ${described} of them described.`,
    columns: [
      { label: "feature", get: (i) => part.site[i] * 1e9 + part.feature[i], cell: (i) => (card(i) ? el("button", { type: "button", class: "link", "aria-label": `Card of ${name(i)}`, click: () => open(i) }, name(i)) : name(i)) },
      { label: "c", form: "number", help: "The coefficient, 1 + delta: 1 is untouched, 0 switches the feature off", get: (i) => 1 + part.delta[i] },
      { label: "|delta|", form: "number", get: (i) => Math.abs(part.delta[i]) },
      ...optional.map(([key, form, help]) => ({ label: key === "f1" ? "F1" : key, form, help, get: (i) => value(i, key) })),
      ...(has(label) ? [{ label, get: (i) => words(i, label) }] : []),
      { label: "fires on", wide: true, get: (i) => words(i, "fires_on") },
      { label: "promotes", wide: true, get: (i) => words(i, "promotes") },
    ],
    count: part.site.length, page: 12, search: { label: "Search", placeholder: "token, label, site or number", text },
    sort: optional.some(([key]) => key === "effect") ? 3 : 2, first: true,
    changed: (rows) => { page = rows.filter(card); fill(page); },
  });
  function fill(list) {
    cards.replaceChildren(...list.map((i) => featureCard(part, i, name(i))));
  }
  function open(i) {
    fill([i, ...page.filter((j) => j !== i)]);
    cards.firstChild.focus();
    cards.firstChild.scrollIntoView({ block: "nearest" });
  }
  return el("div", {}, shown, cards, ranks(part), files(`features-${part.run}`), command(data.command, "write this page again"));
}

function featureCard(part, i, name) {
  const f = part.cards[i], c = 1 + part.delta[i], peak = Math.max(1e-9, ...(f.contexts || []).flatMap((context) => context.map(([, v]) => v)));
  const rows = [["label", f.label], ["fires on", f.fires_on], ["promotes", f.promotes], ["suppresses", f.suppresses],
    ["attribute", f.attribute ? `${f.attribute}${typeof f.f1 === "number" ? ` (F1 ${f.f1.toFixed(2)})` : ""}` : ""],
    ["density", typeof f.density === "number" ? `${(100 * f.density).toFixed(2)} % of tokens` : ""],
    ["effect", typeof f.effect === "number" ? format(f.effect) : ""]].filter(([, v]) => v && v.length);
  const list = el("dl");
  for (const [key, v] of rows) list.append(el("dt", {}, key), el("dd", {}, Array.isArray(v) ? v.join(" · ") : String(v)));
  const contexts = (f.contexts || []).map((context) => {
    const gap = context.some(([token]) => /^\s/.test(token)) ? "" : " ";  // between tokens that bring no space of their own
    return el("p", { class: "context text" }, ...context.flatMap(([token, v], at) => [at ? token.match(/^\s*/)[0] || gap : "",
      el("span", v > 0 ? { style: `background:rgba(var(--fire),${Math.min(0.55, (v / peak) * 0.55).toFixed(2)})`, title: format(v) } : {}, token.trimStart())]));
  });
  const heading = el("h3", {}, name, el("span", { class: c >= 1 ? "up" : "down" }, `c = ${c.toFixed(2)}`));
  return el("article", { class: "card", tabindex: -1, "aria-label": name }, heading, list, ...contexts);
}

function ranks(part) {
  const series = part.sites.map((site, s) => {
    const sizes = part.delta.filter((_, i) => part.site[i] === s).map(Math.abs).sort((a, b) => b - a);
    const kept = sizes.map((_, i) => i).filter((i) => i < 40 || i % Math.ceil(sizes.length / 200) === 0 || i === sizes.length - 1);
    return { name: site, legend: site, colour: s, points: kept.map((i) => ({ x: i + 1, y: sizes[i], lines: [`rank ${i + 1}`, `|delta| ${format(sizes[i])}`] })) };
  });
  return el("figure", {}, el("figcaption", {}, "How concentrated the change is: coefficients of every site by rank."),
    chart({ series, x: "features by |delta|", y: "|delta|", label: "Coefficients by rank", scale: "log1p", height: 260 }));
}

function audits() {
  for (const part of data.audits) {
    const title = data.audits.length > 1 ? el("h3", {}, part.run) : null, gain = part.gain || {}, needed = part.needed || {};
    const facts = [];
    if (typeof gain.gain === "number") facts.push(`Gain of the policy: ${format(gain.gain)}${gain.gain_se ? ` ± ${format(1.96 * gain.gain_se)}` : ""} reward at ${format(gain.kl)} nats.`);
    for (const [share, n] of Object.entries(needed)) if (n && typeof n === "object") facts.push(`${share} % of it with ${n.n} features${typeof n.random === "number" ? ` (as many random ones: ${format(n.random, "share")})` : ""}.`);
    const names = Object.keys(part.curves);
    const series = names.map((name, c) => ({ name: name.replaceAll("_", " "), legend: name.replaceAll("_", " "), colour: c, marks: true, small: true, points: part.curves[name].filter((p) => p.n !== null && p.share !== null).map((p) => ({ x: p.n, y: p.share, ye: 1.96 * (p.share_se || 0), lines: [`${p.n} features`, `${format(p.share, "share")} of the gain`] })) }));
    section("audit", title, facts.length ? el("p", {}, facts.join(" ")) : null,
      series.length ? el("figure", {}, el("figcaption", {}, "What is left of the gain when only some features keep their coefficients, or some lose theirs."), chart({ series, x: "features", y: "share of the gain", label: "Share of the gain by features kept", scale: "log1p" }), files(`audit-${part.run}`)) : null,
      reverts(part), command(part.command, "audit again"));
  }
}

function reverts(part) {
  const rows = part.reverts;
  if (!rows.length) return null;
  const keys = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter((key) => !["site", "feature"].includes(key) && !key.endsWith("_se") && rows.some((row) => typeof row[key] === "number" || typeof row[key] === "string" || Array.isArray(row[key])));
  const nested = rows.some((row) => row.revert && typeof row.revert === "object") ? ["reward", "kl"] : [];
  const show = (row, key) => (Array.isArray(row[key]) ? row[key].join(" · ") : row[key]);
  return table({
    name: "Reverted features",
    caption: "Features by what they carry. Reward, KL and loss are the changes when the feature alone is reverted; ± half a 95 % interval.",
    columns: [
      { label: "feature", get: (i) => `${rows[i].site} #${rows[i].feature}` },
      ...keys.map((key) => (rows.some((row) => typeof row[key] === "number")
        ? { label: key.replaceAll("_", " "), form: "number", get: (i) => rows[i][key], cell: (i) => interval(rows[i][key], typeof rows[i][`${key}_se`] === "number" ? 1.96 * rows[i][`${key}_se`] : null) }
        : { label: key.replaceAll("_", " "), wide: true, get: (i) => show(rows[i], key), cell: (i) => String(show(rows[i], key) || "–") })),
      ...nested.map((key) => ({ label: `revert: ${key}`, form: "number", get: (i) => (rows[i].revert || {})[key] })),
    ],
    count: rows.length, page: 15, search: { label: "Search", text: (i) => JSON.stringify(rows[i]).toLowerCase() },
  });
}

function comparisons() {
  for (const part of data.comparisons) {
    const rows = part.rows, cell = (i, key, form) => interval(rows[i][key], rows[i][`${key}_half`], form);
    section("compare", table({
      name: "Methods at equal KL",
      caption: `${part.run}: mean over seeds ± half a 95 % interval.${part.baseline ? ` Baseline: ${part.baseline}.` : ""}${part.note ? ` Note: ${part.note}.` : ""}`,
      columns: [
        { label: "method", get: (i) => rows[i].method + (rows[i].measured ? ` (${rows[i].measured})` : "") },
        { label: "seeds", form: "int", get: (i) => rows[i].runs },
        { label: "KL, nats", form: "number", get: (i) => rows[i].kl },
        { label: "gain", form: "number", get: (i) => rows[i].gain, cell: (i) => (rows[i].gain === null ? "not reached" : cell(i, "gain")) },
        { label: "minus baseline", form: "number", get: (i) => rows[i].difference, cell: (i) => cell(i, "difference") },
        { label: "of the optimum", form: "share", get: (i) => rows[i].efficiency, cell: (i) => cell(i, "efficiency", "share") },
      ],
      count: rows.length,
    }), command(data.provenance.find((run) => run.path === part.run)?.command, "compare again"));
  }
}

function others() {
  for (const part of data.others) {
    const keys = [...new Set(part.lines.flatMap((line) => Object.keys(line)))].filter((key) => !["name", "module", "target", "penalty_weight", "sha256"].includes(key)).slice(0, 10);
    if (!part.lines.length || !keys.length) continue;
    section("others", table({
      name: `${part.job} ${part.run}`,
      caption: `${part.run}: saerl ${part.job}, ${part.status}`,
      columns: [{ label: part.job === "train-sae" ? "SAE" : "run", get: (i) => part.lines[i].name || part.run }, ...keys.map((key) => ({ label: key.replaceAll("_", " "), form: part.lines.some((line) => typeof line[key] === "number") ? "number" : "text", get: (i) => part.lines[i][key] ?? null }))],
      count: part.lines.length, page: 20,
    }));
  }
}

function provenance() {
  const missing = data.missing.length ? el("div", {}, el("h3", {}, "What is missing"), table({
    name: "What is missing",
    caption: "Every run gets a page; this is what its files do not say.",
    columns: [{ label: "run", get: (i) => data.missing[i].run }, { label: "missing", wide: true, get: (i) => data.missing[i].text }],
    count: data.missing.length, page: 20,
  })) : null;
  const runs = data.provenance.map((run) => {
    const proof = run.frozen === true ? ", all that is frozen is unchanged" : run.frozen === false ? ", frozen weights MOVED" : "";
    const details = el("details", {}, el("summary", {}, `${run.run}: saerl ${run.job}, ${run.status}${proof}`));
    details.addEventListener("toggle", () => {  // filled when it is opened: there may be hundreds
      if (details.children.length > 1) return;
      details.append(el("p", { class: "note soft" }, run.path), command(run.command, `run ${run.run} again, or resume it`) || "", el("pre", { tabindex: 0 }, run.facts), run.config ? el("pre", { tabindex: 0 }, run.config) : "");
    });
    return details;
  });
  section("provenance", missing, el("h3", {}, "Commands, versions, settings"), ...runs);
}

function navigation() {
  const links = [...document.querySelectorAll("main > section:not([hidden])")].map((node) => el("li", {}, el("a", { href: `#${node.id}` }, node.querySelector("h2").textContent.split(":")[0])));
  document.querySelector("nav").append(el("ul", {}, ...links));
}

for (const fill of [numbers, frontier, curves, behaviour, samples, features, audits, comparisons, others, provenance, navigation]) fill();
document.getElementById("again").append(command(data.command, "write this page again") || "");
document.documentElement.dataset.ready = String(Math.round(performance.now()));
