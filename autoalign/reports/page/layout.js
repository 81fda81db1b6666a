// Where rows and ribbons stand: counterparts on one height where their order allows it.

const ROW = 24; // pixels
const BAND = 18; // of a row, that its ribbons may fill

function layOut(rows) {
  for (const side of ["source", "target"]) {
    rows[side].forEach((row, index) => { row.index = index; });
  }
  const ribbons = ribbonsBetween(rows);
  const anchors = anchorsOf(rows, ribbons);
  place(rows, anchors);
  stackRibbons(rows, ribbons);
  for (const side of ["source", "target"]) findEnds(rows[side]);
  const blocks = { source: blocksOf(rows.source), target: blocksOf(rows.target) };
  const last = (side) => (rows[side].length ? rows[side][rows[side].length - 1].y + ROW : 0);
  return { rows, ribbons, blocks, bridges: bridgesBetween(rows, ribbons, blocks), height: Math.max(last("source"), last("target")) };
}

// For each visible tensor the row that shows it: the innermost one.
function rowOfLeaves(side, rows) {
  const found = new Int32Array(side.shape.length).fill(-1);
  for (const row of rows) {
    if (row.open) continue;
    for (const node of row.members) {
      for (let leaf = side.leaves[node]; leaf < side.leaves[side.end[node]]; leaf++) found[leaf] = row.index;
    }
  }
  return found;
}

function ribbonsBetween(rows) {
  const rowOf = {
    source: rowOfLeaves(sides.source, rows.source),
    target: rowOfLeaves(sides.target, rows.target),
  };
  const found = new Map();
  for (let link = 0; link < links.count; link++) {
    if (!state.visible.links[link]) continue;
    const target = rowOf.target[links.target[link]];
    const places = new Set();
    links.sources[link].forEach((leaf, slot) => {
      const source = rowOf.source[leaf];
      if (source < 0 || target < 0 || places.has(source)) return;
      places.add(source);
      const key = source * rows.target.length + target;
      let ribbon = found.get(key);
      if (!ribbon) {
        ribbon = { source, target, links: [], kind: kindOf[link], slot, kinds: new Set(), operations: new Set() };
        found.set(key, ribbon);
      }
      ribbon.links.push(link);
      ribbon.kinds.add(kindOf[link]);
      if (WORST.indexOf(kindOf[link]) > WORST.indexOf(ribbon.kind)) ribbon.kind = kindOf[link];
      const operation = data.operations[links.operation[link]][1];
      if (operation !== "copy" && kindOf[link] !== "mismatched") ribbon.operations.add(operation);
    });
  }
  const ribbons = [...found.values()].sort((a, b) => a.target - b.target || a.slot - b.slot || a.source - b.source);
  for (const side of ["source", "target"]) {
    for (const row of rows[side]) row.ribbons = [];
  }
  for (const ribbon of ribbons) {
    rows.source[ribbon.source].ribbons.push(ribbon);
    rows.target[ribbon.target].ribbons.push(ribbon);
  }
  return ribbons;
}

// The first place in a list from which on something holds.
function firstPlace(list, holds) {
  let low = 0;
  for (let high = list.length; low < high; ) {
    const probe = (low + high) >> 1;
    if (holds(list[probe])) high = probe;
    else low = probe + 1;
  }
  return low;
}

// Pairs of rows that rise on both sides: the most of them that fit together.
function anchorsOf(rows, ribbons) {
  const middle = (list) => list[(list.length - 1) >> 1];
  const pairs = ribbons.filter((ribbon) =>
    middle(rows.source[ribbon.source].ribbons) === ribbon && middle(rows.target[ribbon.target].ribbons) === ribbon);
  pairs.sort((a, b) => a.target - b.target);
  const tails = [];
  const before = new Map();
  for (const pair of pairs) {
    const low = firstPlace(tails, (tail) => tail.source >= pair.source);
    before.set(pair, low ? tails[low - 1] : null);
    tails[low] = pair;
  }
  const anchors = [];
  for (let pair = tails[tails.length - 1]; pair; pair = before.get(pair)) anchors.push(pair);
  return anchors.reverse();
}

function place(rows, anchors) {
  const done = { source: 0, target: 0 };
  let y = 0;
  for (const anchor of [...anchors, null]) {
    const upTo = anchor ? anchor : { source: rows.source.length, target: rows.target.length };
    const room = Math.max(upTo.source - done.source, upTo.target - done.target);
    for (const side of ["source", "target"]) {
      const free = rows[side].slice(done[side], upTo[side]);
      let headings = 0; // open modules stay right above what is below them
      while (anchor && headings < free.length && free[free.length - 1 - headings].open) headings++;
      free.forEach((row, k) => {
        row.y = y + ROW * (k < free.length - headings ? k : k + room - free.length);
      });
      if (anchor) rows[side][upTo[side]].y = y + ROW * room;
      done[side] = upTo[side] + 1;
    }
    y += ROW * (room + 1);
  }
}

// Each ribbon's share of its rows, as tensors join or part in it.
function stackRibbons(rows, ribbons) {
  for (const side of ["source", "target"]) {
    for (const row of rows[side]) {
      const list = row.ribbons;
      if (!list.length) continue;
      if (side === "source") list.sort((a, b) => a.target - b.target);
      const band = list.length > 1 ? BAND : BAND - 4;
      list.forEach((ribbon, k) => {
        const top = row.y + (ROW - band) / 2 + (k * band) / list.length;
        ribbon[side === "source" ? "from" : "to"] = [top, top + Math.max(1, band / list.length - (list.length > 6 ? 0 : 1))];
      });
    }
  }
  for (const ribbon of ribbons) {
    ribbon.top = Math.min(ribbon.from[0], ribbon.to[0]);
    ribbon.bottom = Math.max(ribbon.from[1], ribbon.to[1]);
  }
}

// For each row the last row below it.
function findEnds(rows) {
  const above = [];
  for (const row of [...rows, { level: -1, index: rows.length }]) {
    while (above.length && above[above.length - 1].level >= row.level) above.pop().end = row.index - 1;
    above.push(row);
  }
}

// The open members of lists, the outermost ones: what a person calls the blocks of a network.
function blocksOf(rows) {
  const blocks = [];
  for (const row of rows) {
    const last = blocks[blocks.length - 1];
    row.block = null;
    if (last && row.index <= last.end) row.block = last;
    else if (row.open && row.listed) {
      row.block = { top: row.y + 1, bottom: rows[row.end].y + ROW - 1, end: row.end };
      blocks.push(row.block);
    }
  }
  return blocks;
}

// Which block of the other side most of a block's ribbons lead to.
function bridgesBetween(rows, ribbons, blocks) {
  const shared = new Map();
  for (const ribbon of ribbons) {
    const [from, to] = [rows.source[ribbon.source].block, rows.target[ribbon.target].block];
    if (from) from.ribbons = (from.ribbons ?? 0) + 1;
    if (to) to.ribbons = (to.ribbons ?? 0) + 1;
    if (!from || !to) continue;
    const key = `${from.top} ${to.top}`;
    if (!shared.has(key)) shared.set(key, { from, to, count: 0 });
    shared.get(key).count++;
  }
  return [...shared.values()].filter(({ from, to, count }) => 2 * count > Math.min(from.ribbons, to.ribbons))
    .map(({ from, to }) => ({
      from: [from.top, from.bottom], to: [to.top, to.bottom],
      top: Math.min(from.top, to.top), bottom: Math.max(from.bottom, to.bottom),
    }));
}

function ribbonPath(ribbon, width, offset) {
  const middle = width / 2;
  const [a, b] = ribbon.from.map((y) => y - offset);
  const [c, d] = ribbon.to.map((y) => y - offset);
  return `M0 ${a}C${middle} ${a} ${middle} ${c} ${width} ${c}L${width} ${d}C${middle} ${d} ${middle} ${b} 0 ${b}Z`;
}

function linePath(ribbon, width, offset) {
  const middle = width / 2;
  const a = (ribbon.from[0] + ribbon.from[1]) / 2 - offset;
  const c = (ribbon.to[0] + ribbon.to[1]) / 2 - offset;
  return `M0 ${a}C${middle} ${a} ${middle} ${c} ${width} ${c}`;
}
