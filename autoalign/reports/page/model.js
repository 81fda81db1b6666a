// The data of the page as arrays: two trees, and the links between their tensors.

function readSide(raw, name) {
  const count = raw.depth.length;
  const side = {
    name, count,
    names: raw.name,
    depth: new Int32Array(count),
    tensor: new Uint8Array(count),
    end: new Int32Array(count).fill(count), // the first node that is not below
    parent: new Int32Array(count).fill(-1),
    leaves: new Int32Array(count + 1), // tensors before each node
    run: new Int32Array(count), // siblings in the run that starts here
    shown: new Int32Array(count), // the node that stands for this one where all is folded
    nodeOf: new Int32Array(raw.shape.length),
    shape: raw.shape,
    dtype: raw.dtype,
    left: new Map(raw.left.map((row) => [row[0], row])),
  };
  const path = [];
  let leaf = 0;
  for (let node = 0; node < count; node++) {
    const tensor = raw.depth[node] < 0;
    const depth = tensor ? -1 - raw.depth[node] : raw.depth[node];
    side.depth[node] = depth;
    side.tensor[node] = tensor ? 1 : 0;
    side.leaves[node] = leaf;
    if (tensor) side.nodeOf[leaf++] = node;
    while (path.length > depth) side.end[path.pop()] = node;
    if (path.length) side.parent[node] = path[path.length - 1];
    path.push(node);
  }
  side.leaves[count] = leaf;
  for (const [node, length] of raw.runs) side.run[node] = length;
  for (let node = 0; node < count; node++) side.shown[node] = node;
  for (let node = 0; node < count; node++) {
    if (side.shown[node] !== node) {
      side.shown[node] = side.shown[side.shown[node]];
    } else if (side.run[node]) {
      const size = side.end[node] - node;
      const end = node + size * side.run[node];
      for (let other = node + size; other < end; other++) side.shown[other] = node + ((other - node) % size);
    }
  }
  return side;
}

const data = JSON.parse(document.getElementById("data").textContent);
const sides = { source: readSide(data.source, "source"), target: readSide(data.target, "target") };
const other = { source: "target", target: "source" };
const links = {
  ...data.links,
  count: data.links.target.length,
  sources: data.links.sources.map((of) => (typeof of === "number" ? [of] : of)),
};
const linksOf = { source: sides.source.shape.map(() => []), target: sides.target.shape.map(() => []) };
for (let link = 0; link < links.count; link++) {
  linksOf.target[links.target[link]].push(link);
  for (const leaf of new Set(links.sources[link])) linksOf.source[leaf].push(link);
}

// What a link or a tensor without a link is shown as: a colour, a filter and a place in the legend.
const DIFF = Boolean(data.links.change); // two checkpoints are compared, and the colours are those of changes
const KINDS = DIFF ? [
  ["sure", "equal"], ["good", "close"], ["low", "changed"], ["poor", "by 10 % and more"],
  ["ambiguous", "ambiguous, not compared"], ["mismatched", "of other shapes, not compared"],
  ["missing", "only in the second"], ["unexpected", "only in the first"],
] : [
  ["sure", "0.99 and more"], ["good", "0.9 to 0.99"], ["low", "low: 0.7 to 0.9"], ["poor", "low: below 0.7"],
  ["adapted", "adapted"], ["ambiguous", "ambiguous, not loaded"], ["mismatched", "mismatched, not loaded"],
  ["missing", "missing"], ["unexpected", "unexpected"],
];
const WORST = ["sure", "good", "adapted", "low", "poor", "ambiguous", "mismatched"];
const kindOf = links.confidence.map((confidence, link) => {
  const status = data.statuses[links.status[link]];
  if (DIFF && links.change[link]) return links.change[link][0];
  if (status !== "matched") return status;
  return confidence >= 0.99 ? "sure" : confidence >= 0.9 ? "good" : confidence >= 0.7 ? "low" : "poor";
});
const isMissing = (leaf) => linksOf.target[leaf].length === 0;
const isUnexpected = (leaf) => sides.source.left.has(leaf);
const counts = Object.fromEntries(KINDS.map(([kind]) => [kind, 0]));
for (const kind of kindOf) counts[kind]++;
counts.missing = linksOf.target.filter((found) => !found.length).length;
counts.unexpected = sides.source.left.size;

function keyOf(side, leaf) {
  const parts = [];
  for (let node = side.nodeOf[leaf]; node >= 0; node = side.parent[node]) parts.push(data.names[side.names[node]]);
  return parts.reverse().join(".");
}

function lowerKeys(side) {
  side.lower ??= side.shape.map((_, leaf) => keyOf(side, leaf).toLowerCase());
  return side.lower;
}

const shapeText = (side, leaf) => `[${data.shapes[side.shape[leaf]].join(", ")}]`;
const elements = (side, leaf) => data.shapes[side.shape[leaf]].reduce((product, size) => product * size, 1);

// Write names that differ in a number as one: layers.{0...11}.
function joinNames(names) {
  const distinct = [...new Set(names)];
  if (distinct.length === 1) return distinct[0];
  const parts = distinct.map((name) => /^(.*?)(\d+)(\D*)$/s.exec(name));
  if (parts.some((part) => !part)) return `{${distinct.slice(0, 3).join(",")}${distinct.length > 3 ? ",…" : ""}}`;
  return `${parts[0][1]}{${rangeText(parts.map((part) => Number(part[2])))}}${parts[0][3]}`;
}

function rangeText(numbers) {
  const values = [...numbers].sort((a, b) => a - b);
  const step = values[1] - values[0];
  if (values.length > 3 && step > 1 && values.every((value, k) => value === values[0] + k * step)) {
    return `${values[0]},${values[1]},…,${values[values.length - 1]}`;
  }
  const runs = [];
  for (const value of values) {
    const last = runs[runs.length - 1];
    if (last && value === last[1] + 1) last[1] = value;
    else runs.push([value, value]);
  }
  const parts = runs.flatMap(([first, last]) =>
    last - first > 1 ? [`${first}…${last}`] : last > first ? [first, last] : [first]);
  if (parts.length > 6) parts.splice(5, parts.length - 6, "…");
  return parts.join(",");
}

// Write the keys of tensors that stand for each other as one, level by level.
function joinKeys(side, leaves) {
  const parts = [];
  for (let nodes = leaves.map((leaf) => side.nodeOf[leaf]); nodes[0] >= 0; nodes = nodes.map((n) => side.parent[n])) {
    parts.push(joinNames(nodes.map((node) => data.names[side.names[node]])));
  }
  return parts.reverse().join(".");
}
