// Which tensors pass the filters, and the rows that show them: folded, opened and closed.

const state = {
  query: "", kinds: new Set(), operation: "",
  detail: "layers", fold: true,
  opened: { source: new Map(), target: new Map() }, // what a person opened or closed, by row
  unfolded: { source: new Set(), target: new Set() },
  selected: null,
};
const BLOCKS = 44; // rows of a side to aim at where blocks are shown
const LISTS = 3; // groups of a list that need no row above them
const LAYERS = 130; // rows up to which all layers are shown at first

const filtering = () => Boolean(state.query || state.kinds.size || state.operation);

function applyFilters() {
  const query = state.query.toLowerCase();
  const found = query && {
    source: lowerKeys(sides.source).map((key) => key.includes(query)),
    target: lowerKeys(sides.target).map((key) => key.includes(query)),
  };
  const wanted = (kind) => !state.kinds.size || state.kinds.has(kind);
  const visible = {
    links: new Uint8Array(links.count),
    source: new Uint8Array(sides.source.shape.length),
    target: new Uint8Array(sides.target.shape.length),
  };
  for (let link = 0; link < links.count; link++) {
    const [target, sources] = [links.target[link], links.sources[link]];
    if (!wanted(kindOf[link]) && !(state.kinds.has("unexpected") && sources.some(isUnexpected))) continue;
    if (state.operation && data.operations[links.operation[link]][1] !== state.operation) continue;
    if (found && !found.target[target] && !sources.some((leaf) => found.source[leaf])) continue;
    visible.links[link] = 1;
    visible.target[target] = 1;
    for (const leaf of sources) visible.source[leaf] = 1;
  }
  if (!state.operation) {
    for (const side of ["source", "target"]) {
      const kind = side === "source" ? "unexpected" : "missing";
      linksOf[side].forEach((of, leaf) => {
        if (of.length || (found && !found[side][leaf])) return;
        const tied = side === "source" && !isUnexpected(leaf);
        if (tied ? !state.kinds.size : wanted(kind)) visible[side][leaf] = 1;
      });
    }
  }
  for (const side of ["source", "target"]) {
    const before = new Int32Array(visible[side].length + 1);
    for (let leaf = 0; leaf < visible[side].length; leaf++) before[leaf + 1] = before[leaf] + visible[side][leaf];
    sides[side].before = before; // visible tensors before each tensor
  }
  state.visible = visible;
}

const visibleBelow = (side, node) => side.before[side.leaves[side.end[node]]] - side.before[side.leaves[node]];

// The visible tensors of a row, those of them that nothing joins with the other side, and what joins the others.
const leavesBelow = ({ side, members }) => members.flatMap((node) => {
  const [first, end] = [side.leaves[node], side.leaves[side.end[node]]];
  return Array.from({ length: end - first }, (_, k) => first + k).filter((leaf) => state.visible[side.name][leaf]);
});
const looseBelow = (row) => leavesBelow(row).filter((leaf) => !linksOf[row.side.name][leaf].length);
const linksBelow = (row) => new Set(leavesBelow(row).flatMap((leaf) =>
  linksOf[row.side.name][leaf].filter((link) => state.visible.links[link])));

// The groups of nodes one level below: each a row, which may stand for a run of siblings and for several parents.
function groupsBelow(side, members) {
  const first = members ? members[0] : -1;
  const end = members ? side.end[first] : side.count;
  const groups = [];
  for (let child = first + 1; child < end; ) {
    const size = side.end[child] - child;
    let length = state.fold ? side.run[child] || 1 : 1;
    const all = [];
    for (const member of members ?? [-1]) {
      for (let k = 0; k < length; k++) all.push(member + child - first + k * size);
    }
    const id = `${all[0]}x${all.length}`;
    if (length > 1 && state.unfolded[side.name].has(id)) {
      for (let k = 0; k < length; k++) {
        push((members ?? [-1]).map((member) => member + child - first + k * size), 1, id, k === 0);
      }
    } else {
      push(all, length, "", false);
    }
    child += size * length;
  }
  return groups;

  function push(all, length, unfoldedFrom, isFirst) {
    const seen = all.filter((node) => visibleBelow(side, node));
    if (!seen.length) return;
    const group = { side, all, members: seen, id: `${all[0]}x${all.length}`, length, unfoldedFrom, isFirst, prefix: "" };
    const listed = length === 1 && !unfoldedFrom && isShortList(side, all[0]) ? groupsBelow(side, all) : [];
    if (!listed.length || listed.length > LISTS) {
      groups.push(group);
      return;
    }
    const prefix = `${joinNames(seen.map((node) => data.names[side.names[node]]))}.`;
    groups.push(...listed.map((below) => ({ ...below, prefix: prefix + below.prefix })));
  }
}

// A list of modules, whose children are numbers; where it has few rows below it needs none of its own.
function isShortList(side, node) {
  if (side.tensor[node]) return false;
  let groups = 0;
  for (let child = node + 1; child < side.end[node]; ) {
    if (side.tensor[child] || !/^\d+$/.test(data.names[side.names[child]]) || ++groups > LISTS) return false;
    child += (side.end[child] - child) * (state.fold ? side.run[child] || 1 : 1);
  }
  return true;
}

// A module of tensors that go together, such as a weight and its bias: shown closed unless tensors are asked for.
function isPlain(side, node) {
  side.plain ??= new Map();
  const shown = side.shown[node];
  if (!side.plain.has(shown)) side.plain.set(shown, findPlain(side, shown));
  return side.plain.get(shown);
}

function findPlain(side, node) {
  const opposite = sides[other[side.name]];
  const uses = new Set();
  for (let child = node + 1; child < side.end[node]; child++) {
    if (!side.tensor[child]) return false;
    const modules = partners(side, side.leaves[child]).map((leaf) => opposite.parent[opposite.nodeOf[leaf]]);
    if (modules.length) uses.add(modules.join());
  }
  return uses.size <= 1;
}

function partners(side, leaf) {
  return linksOf[side.name][leaf].flatMap((link) => (side.name === "source" ? [links.target[link]] : links.sources[link]));
}

function isOpen(group) {
  const { side, id, node } = group;
  const chosen = state.opened[side.name].get(id);
  if (chosen !== undefined) return chosen;
  if (state.detail === "tensors") return true;
  if (isPlain(side, node)) return false;
  return state.detail === "layers" || state.byBudget[side.name].has(id);
}

// One row: a chain of modules with one child each is written as one name.
function rowOf(group, level, parents) {
  const side = group.side;
  let row = { ...group, level, label: "" };
  for (;;) {
    const names = row.members.map((node) => data.names[side.names[node]]);
    row.label += (row.label && ".") + row.prefix + joinNames(names);
    if (row.length > 1) row.runs = [...(row.runs ?? []), row.id];
    if (row.unfoldedFrom) [row.from, row.first] = [row.unfoldedFrom, row.isFirst]; // the run that can be folded again
    row.node = row.members[0];
    row.tensor = Boolean(side.tensor[row.node]);
    if (row.tensor) break;
    row.below = groupsBelow(side, row.all);
    if (row.below.length !== 1) break;
    row = { ...row, ...row.below[0] };
  }
  row.tensors = row.members.reduce((sum, node) => sum + visibleBelow(side, node), 0);
  row.times = Math.ceil(row.members.length / parents); // repeats in one module above
  if (row.times === 1) row.runs = undefined;
  row.listed = /(\d|\})$/.test(row.label) && !row.tensor; // a member of a list, or a run of them: a block
  return row;
}

function chooseByBudget(side) {
  const chosen = new Set();
  let level = groupsBelow(side, null).map((group) => rowOf(group, 0, 1));
  let rows = level.length;
  while (level.length) {
    const next = [];
    for (const row of level) {
      if (row.tensor || row.listed || isPlain(side, row.node) || rows + row.below.length > BLOCKS) continue;
      chosen.add(row.id);
      rows += row.below.length;
      next.push(...row.below.map((group) => rowOf(group, row.level + 1, row.members.length)));
    }
    level = next;
  }
  return chosen;
}

function rowsOf(side, limit = Infinity) {
  const rows = [];
  const stack = [groupsBelow(side, null).map((group, k, all) => ({ group, level: 0, parents: 1, place: k + 1, of: all.length }))];
  while (stack.length && rows.length < limit) {
    const next = stack[stack.length - 1].shift();
    if (!next) {
      stack.pop();
      continue;
    }
    const row = rowOf(next.group, next.level, next.parents);
    row.place = next.place;
    row.of = next.of;
    row.open = !row.tensor && isOpen(row);
    rows.push(row);
    if (row.open) {
      const [level, parents, of] = [next.level + 1, row.members.length, row.below.length];
      stack.push(row.below.map((group, k) => ({ group, level, parents, place: k + 1, of })));
    }
  }
  return rows;
}

function visibleRows() {
  if (state.detail === "blocks") {
    state.byBudget = { source: chooseByBudget(sides.source), target: chooseByBudget(sides.target) };
  }
  return { source: rowsOf(sides.source), target: rowsOf(sides.target) };
}

function chooseDetail() {
  state.detail = "layers";
  const most = Math.max(...["source", "target"].map((side) => rowsOf(sides[side], LAYERS + 1).length));
  if (most > LAYERS) state.detail = "blocks";
}
