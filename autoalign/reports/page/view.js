// The picture on the screen: the rows and ribbons in sight, and no others.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = 600; // pixels above and below the window that are drawn as well
let layout = null;
const drawn = { source: new Map(), target: new Map() };

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

function svg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// How many of a row's tensors are missing or unexpected.
const looseIn = (row) => looseBelow(row).filter((leaf) => row.side.name === "target" || isUnexpected(leaf)).length;

function kindsOfRow(row) {
  const kinds = new Map();
  for (const ribbon of row.ribbons) {
    for (const kind of ribbon.kinds) if (!kinds.has(kind)) kinds.set(kind, 1);
  }
  row.loose ??= looseIn(row);
  if (row.loose) kinds.set(row.side.name === "target" ? "missing" : "unexpected", row.loose);
  return kinds;
}

const PILLS = { ambiguous: "? ambiguous", mismatched: "≠ shape", adapted: "~ adapted", missing: DIFF ? "only here" : "missing", unexpected: DIFF ? "only here" : "unexpected" };

function rowElement(row) {
  const side = row.side;
  const kinds = row.open ? new Map() : kindsOfRow(row);
  const worst = [...kinds.keys()].sort((a, b) => rank(b) - rank(a))[0] ?? "";
  const pills = [...kinds].filter(([kind]) => PILLS[kind]).map(([kind, count]) => {
    const part = (kind === "missing" || kind === "unexpected") && count < row.tensors ? `${count.toLocaleString("en")} ` : "";
    return el("span", { class: `pill ${kind}` }, part + PILLS[kind]);
  });
  const node = el("div", {
    class: `row${row.open ? " open" : ""}${row.tensor ? " tensor" : ""}${isSelected(row) ? " selected" : ""} k-${worst || "none"}`,
    role: "treeitem", id: rowId(row), "aria-level": row.level + 1, "aria-posinset": row.place, "aria-setsize": row.of,
    "aria-expanded": row.tensor ? null : String(row.open), "aria-selected": String(isSelected(row)),
    "aria-label": describe(row, kinds),
  });
  node.append(
    el("span", { class: "indent" }), el("span", { class: row.tensor ? "twist none" : "twist" }),
    labelElement(row.label),
    row.runs ? timesElement(row) : "", row.from && row.first ? el("button", {
      type: "button", class: "times", tabindex: -1, title: "Fold the repeats again", "data-fold": row.from }, "fold") : "",
    el("span", { class: "rest" }, ...(row.open ? [] : [
      el("span", { class: "tail" }, tail(row)), el("span", { class: "shape" }, shapes(row))])),
    ...pills, el("span", { class: "edge" }));
  node.style.setProperty("--level", row.level);
  node.style.transform = `translateY(${row.y}px)`;
  node.row = row;
  return node;
}

const rowId = (row) => `${row.side.name}-${row.id}`;
const rank = (kind) => [...WORST, "missing", "unexpected"].indexOf(kind);
const isSelected = (row) => Boolean(state.selected?.row) && rowId(state.selected.row) === rowId(row);

function timesElement(row) {
  return el("button", {
    type: "button", class: "times", tabindex: -1, title: "Show each of the repeats", "data-unfold": row.runs[0],
  }, `×${row.times.toLocaleString("en")}`);
}

function labelElement(label) {
  const at = state.query ? label.toLowerCase().indexOf(state.query.toLowerCase()) : -1;
  if (at < 0) return el("span", { class: "label" }, label || "(empty)");
  const end = at + state.query.length;
  return el("span", { class: "label" }, label.slice(0, at), el("mark", {}, label.slice(at, end)), label.slice(end));
}

function tail(row) {
  if (row.tensor) return "";
  const side = row.side;
  const below = groupsBelow(side, row.all);
  if (!below.every((group) => side.tensor[group.members[0]])) return `${row.tensors.toLocaleString("en")} tensors`;
  const names = below.map((group) => joinNames(group.members.map((node) => data.names[side.names[node]])));
  return names.length > 3 ? `${names.slice(0, 2).join(", ")}, +${names.length - 2}` : names.join(", ");
}

function shapes(row) {
  const side = row.side;
  const node = row.members[0];
  if (!row.tensor && !isPlain(side, node)) return "";
  let largest = side.leaves[node];
  for (let leaf = largest; leaf < side.leaves[side.end[node]]; leaf++) {
    if (elements(side, leaf) > elements(side, largest)) largest = leaf;
  }
  return shapeText(side, largest);
}

function describe(row, kinds) {
  const what = row.tensor ? shapes(row) : `${row.tensors} tensors`;
  const times = row.times > 1 ? `, ${row.times} times` : "";
  const opposite = layout.rows[other[row.side.name]];
  const labels = row.ribbons.slice(0, 4).map((ribbon) => opposite[ribbon[other[row.side.name]]].label);
  const joined = labels.length && !row.open ? `, ${row.side.name === "source" ? "to" : "from"} ${labels.join(" and ")}` : "";
  return `${row.label}${times}, ${what}${joined}${[...kinds.keys()].map((kind) => `, ${kind}`).join("")}`;
}

const firstInSight = (rows, top) => firstPlace(rows, (row) => row.y + ROW >= top);

function draw() {
  if (!layout) return;
  const canvas = $("canvas");
  const above = canvas.getBoundingClientRect().top;
  const printing = document.documentElement.classList.contains("printing");
  const top = printing ? 0 : Math.max(0, -above - MARGIN);
  const bottom = printing ? layout.height : Math.min(layout.height, -above + window.innerHeight + MARGIN);
  for (const name of ["source", "target"]) {
    const rows = layout.rows[name];
    const seen = new Set();
    for (let k = firstInSight(rows, top); k < rows.length && rows[k].y <= bottom; k++) {
      seen.add(k);
      if (!drawn[name].has(k)) {
        const node = rowElement(rows[k]);
        drawn[name].set(k, node);
        $(name).append(node);
      }
    }
    drawBlocks(name, top, bottom);
    const active = activeRow(name);
    for (const [k, node] of drawn[name]) {
      if (!seen.has(k) && rows[k] !== active) {
        node.remove();
        drawn[name].delete(k);
      }
    }
  }
  drawRibbons(top, bottom);
}

function drawBlocks(name, top, bottom) {
  const blocks = layout.blocks[name].filter((block) => block.bottom >= top && block.top <= bottom);
  const rows = layout.rows[name];
  const guides = rows.filter((row) => row.open && row.y <= bottom && rows[row.end].y >= top).map((row) => {
    const guide = upright("guide", row.y + ROW, rows[row.end].y + ROW - 4);
    guide.style.setProperty("--level", row.level);
    return guide;
  });
  $(`${name}-blocks`).replaceChildren(...blocks.map((block) => upright("block", block.top, block.bottom)), ...guides);
}

function upright(name, top, bottom) {
  const node = el("div", { class: name });
  node.style.transform = `translateY(${top}px)`;
  node.style.height = `${bottom - top}px`;
  return node;
}

const MOST = 2500; // ribbons at once

function drawRibbons(top, bottom) {
  const frame = $("ribbons");
  const width = frame.clientWidth;
  frame.style.transform = `translateY(${top}px)`;
  frame.setAttribute("height", Math.max(0, bottom - top));
  const parts = [];
  const labels = [];
  for (const bridge of layout.bridges) {
    if (bridge.bottom < top || bridge.top > bottom) continue;
    parts.push({ node: svg("path", { class: "bridge", d: ribbonPath(bridge, width, top) }), rank: -2 });
  }
  for (const ribbon of layout.ribbons) {
    if (ribbon.bottom < top || ribbon.top > bottom || parts.length > MOST) continue;
    parts.push(ribbonElement(ribbon, width, top));
    if (width > 150) labels.push(...labelOf(ribbon, width, top));
  }
  for (const name of ["source", "target"]) {
    const rows = layout.rows[name];
    for (let k = firstInSight(rows, top); k < rows.length && rows[k].y <= bottom; k++) {
      const row = rows[k];
      if (row.open) continue;
      row.loose ??= looseIn(row);
      if (row.loose) parts.push(looseEnd(row, width, top));
      if (row.ribbons.length > 1) parts.push(joint(row, width, top));
    }
  }
  parts.sort((a, b) => a.rank - b.rank);
  frame.replaceChildren(...parts.map((part) => part.node), ...labels);
  lightUp();
}

function ribbonElement(ribbon, width, top) {
  const thin = ribbon.kind === "mismatched";
  const node = svg("path", {
    d: thin ? linePath(ribbon, width, top) : ribbonPath(ribbon, width, top), class: `ribbon k-${ribbon.kind}`,
  });
  node.ribbon = ribbon;
  ribbon.node = node;
  return { node, rank: rank(ribbon.kind) };
}

// A tensor that nothing joins ends in the open.
function looseEnd(row, width, top) {
  const source = row.side.name === "source";
  const y = row.y + ROW / 2 - top + (row.ribbons.length ? ROW / 2 - 3 : 0);
  const [from, to] = source ? [0, Math.min(34, width / 4)] : [width, width - Math.min(34, width / 4)];
  const node = svg("g", { class: `loose k-${source ? "unexpected" : "missing"}` });
  node.append(svg("path", { d: `M${from} ${y}H${to + (source ? -4 : 4)}` }), svg("circle", { cx: to, cy: y, r: 4 }));
  return { node, rank: 20 };
}

// Where several ribbons meet in one row.
function joint(row, width, top) {
  const x = row.side.name === "source" ? 1.5 : width - 1.5;
  const y = row.y - top + (ROW - BAND) / 2;
  return { node: svg("path", { class: "joint", d: `M${x} ${y}V${y + BAND}` }), rank: 30 };
}

// What is done on the way, written on the ribbon, or beside the joint of several that it is done to together.
function labelOf(ribbon, width, top) {
  const { source, target } = layout.rows;
  const changed = DIFF && ["low", "poor"].includes(ribbon.kind) && changeText(ribbon.links);
  const operations = [...(changed ? [changed] : []), ...ribbon.operations].slice(0, 2).join(", ");
  if (!operations && ribbon.kind !== "mismatched") return [];
  const joined = target[ribbon.target].ribbons;
  const parted = source[ribbon.source].ribbons;
  const isMiddle = (list) => list[(list.length - 1) >> 1] === ribbon;
  let [at, anchor] = [0.5, "middle"];
  if (joined.length > 1) {
    if (!isMiddle(joined)) return [];
    [at, anchor] = [1 - 8 / width, "end"];
  } else if (parted.length > 1 && parted.every((other) => [...other.operations].join(", ") === operations)) {
    if (!isMiddle(parted)) return [];
    [at, anchor] = [8 / width, "start"];
  }
  const from = (ribbon.from[0] + ribbon.from[1]) / 2;
  const to = (ribbon.to[0] + ribbon.to[1]) / 2;
  const y = from + (to - from) * at * at * (3 - 2 * at) - top + 3.5;
  const node = svg("text", { class: `on-ribbon k-${ribbon.kind}`, x: width * at, y, "text-anchor": anchor });
  const fits = Math.floor((width - 24) / 6.4); // characters
  node.textContent = ribbon.kind === "mismatched" ? "≠" : operations.length > fits ? `${operations.slice(0, fits - 1)}…` : operations;
  return [node];
}

// The largest mean change of some links, as it is written.
function changeText(found) {
  const size = (text) => parseFloat(text.replace(/[<, ]/g, "")) || Infinity; // what is not finite has no number
  const texts = [...new Set(found.filter((link) => ["low", "poor"].includes(kindOf[link])).map((link) => links.change[link][1]))];
  return `${texts.length > 1 ? "up to " : ""}${texts.sort((a, b) => size(b) - size(a))[0]}`;
}

function refresh() {
  layout = layOut(visibleRows());
  for (const name of ["source", "target"]) {
    for (const node of drawn[name].values()) node.remove();
    drawn[name].clear();
  }
  $("canvas").style.height = `${Math.max(layout.height, 40)}px`;
  $("nothing").hidden = layout.rows.source.length + layout.rows.target.length > 0;
  draw();
  markActive();
}

let asked = false;
function drawSoon() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    draw();
  });
}
