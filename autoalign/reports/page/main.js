// What a person does: search, filter, open and close, click, and walk with the keys.

const active = { source: null, target: null }; // the id of the row that the keys move
const activeRow = (name) => layout.rows[name].find((row) => row.id === active[name]) ?? null;

function markActive() {
  for (const name of ["source", "target"]) {
    const row = activeRow(name);
    const node = row && drawn[name].get(row.index);
    for (const one of drawn[name].values()) one.classList.toggle("active", one === node);
    if (node) $(name).setAttribute("aria-activedescendant", node.id);
    else $(name).removeAttribute("aria-activedescendant");
  }
}

function moveTo(name, row) {
  if (!row) return;
  active[name] = row.id;
  const sticky = $("bar").offsetHeight + 8;
  const top = $("canvas").getBoundingClientRect().top + row.y;
  if (top < sticky) window.scrollBy(0, top - sticky);
  else if (top + ROW + 8 > window.innerHeight) window.scrollBy(0, top + ROW + 8 - window.innerHeight);
  draw();
  markActive();
}

// Open or close a row, and its counterpart on the other side with it.
function toggle(row, open) {
  const partner = counterpart(row, (one) => !one.tensor && one.open !== open);
  for (const one of [row, partner]) if (one) state.opened[one.side.name].set(one.id, open);
  keepInPlace(row, refresh);
}

function unfold(row, run) {
  const partner = counterpart(row, (one) => one.runs);
  state.unfolded[row.side.name].add(run);
  if (partner) state.unfolded[partner.side.name].add(partner.runs[0]);
  keepInPlace(row, refresh);
}

function foldAgain(row) {
  const partner = counterpart(row, (one) => one.from);
  state.unfolded[row.side.name].delete(row.from);
  if (partner) state.unfolded[partner.side.name].delete(partner.from);
  keepInPlace(row, refresh);
}

function keepInPlace(row, change) {
  const before = row.y;
  change();
  const now = layout.rows[row.side.name].find((one) => one.id === row.id);
  if (now && window.scrollY > 0) window.scrollBy(0, now.y - before);
  if (now) active[row.side.name] = now.id;
  markActive();
}

// The row of the other side that is joined with the same tensors, if one is with most of them.
function counterpart(row, fits) {
  const own = linksBelow(row);
  if (!own.size) return null;
  let best = null;
  let score = 0.5;
  for (const one of layout.rows[other[row.side.name]]) {
    if (!fits(one) || one.tensors > 8 * row.tensors + 8) continue;
    const its = linksBelow(one);
    let shared = 0;
    for (const link of its) if (own.has(link)) shared++;
    const overlap = shared / (own.size + its.size - shared);
    if (overlap > score) [best, score] = [one, overlap];
  }
  return best;
}

// Light what hangs together with the row or ribbon under the pointer, or with the selection.
let under = null;
function lightUp() {
  const lit = under ?? (state.selected ? { row: state.selected.ribbon ? null : state.selected.row, ribbon: state.selected.ribbon } : null);
  const ribbons = new Set();
  if (lit?.ribbon) ribbons.add(`${lit.ribbon.source} ${lit.ribbon.target}`);
  if (lit?.row) {
    const row = layout.rows[lit.row.side.name].find((one) => one.id === lit.row.id);
    for (const ribbon of row?.ribbons ?? []) ribbons.add(`${ribbon.source} ${ribbon.target}`);
  }
  $("canvas").classList.toggle("lit", ribbons.size > 0);
  const rows = { source: new Set(), target: new Set() };
  for (const ribbon of layout.ribbons) {
    const on = ribbons.has(`${ribbon.source} ${ribbon.target}`);
    ribbon.node?.classList.toggle("on", on);
    if (on) {
      rows.source.add(ribbon.source);
      rows.target.add(ribbon.target);
    }
  }
  for (const name of ["source", "target"]) {
    for (const [k, node] of drawn[name]) node.classList.toggle("joined", rows[name].has(k));
  }
}

const loadedOf = (numbers) => ["sure", "good", "low", "poor", "adapted"].reduce((sum, kind) => sum + (numbers[kind] ?? 0), 0);

function update() {
  applyFilters();
  refresh();
  const shown = Object.fromEntries(KINDS.map(([kind]) => [kind, 0]));
  state.visible.links.forEach((one, link) => { shown[kindOf[link]] += one; });
  state.visible.target.forEach((one, leaf) => { shown.missing += one && isMissing(leaf) ? 1 : 0; });
  state.visible.source.forEach((one, leaf) => { shown.unexpected += one && isUnexpected(leaf) ? 1 : 0; });
  const all = `${loadedOf(counts).toLocaleString("en")} ${DIFF ? "compared" : "matches"}`;
  const parts = [filtering() ? `${loadedOf(shown).toLocaleString("en")} of ${all}` : all];
  for (const kind of filtering() ? ["ambiguous", "mismatched", "missing", "unexpected"] : []) {
    if (shown[kind]) parts.push(`${shown[kind].toLocaleString("en")} ${kind}`);
  }
  $("shown").textContent = parts.join(", ");
  $("reset").hidden = !filtering();
}

function makeChips() {
  if (loadedOf(counts)) $("chips").append(el("span", { class: "legend" }, DIFF ? "Change" : "Confidence"));
  for (const [kind, title] of KINDS) {
    if (!counts[kind]) continue;
    const chip = el("button", { type: "button", class: "chip", "aria-pressed": "false", "data-kind": kind },
      el("span", { class: `swatch k-${kind}` }), title, el("span", { class: "count" }, counts[kind].toLocaleString("en")));
    chip.addEventListener("click", () => {
      const pressed = !state.kinds.has(kind);
      state.kinds[pressed ? "add" : "delete"](kind);
      chip.setAttribute("aria-pressed", String(pressed));
      update();
    });
    $("chips").append(chip);
  }
}

function makeTools() {
  const kinds = new Map();
  links.operation.forEach((operation, link) => {
    if (data.statuses[links.status[link]] === "mismatched") return;
    const kind = data.operations[operation][1];
    kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
  });
  const options = [...kinds].sort((a, b) => b[1] - a[1]);
  $("operation").append(el("option", { value: "" }, "All operations"),
    ...options.map(([kind, count]) => el("option", { value: kind }, `${kind} (${count.toLocaleString("en")})`)));
  $("operation").addEventListener("change", (event) => {
    state.operation = event.target.value;
    update();
  });
  for (const detail of ["blocks", "layers", "tensors"]) {
    const input = el("input", { type: "radio", name: "detail", value: detail, id: `detail-${detail}`, checked: state.detail === detail });
    input.addEventListener("change", () => {
      state.detail = detail;
      for (const side of ["source", "target"]) state.opened[side].clear();
      refresh();
    });
    $("detail").append(input, el("label", { for: `detail-${detail}` }, detail[0].toUpperCase() + detail.slice(1)));
  }
  $("fold").addEventListener("change", (event) => {
    state.fold = event.target.checked;
    refresh();
  });
  let waiting = 0;
  const search = () => {
    clearTimeout(waiting);
    if (state.query === $("search").value) return;
    state.query = $("search").value;
    update();
  };
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 120);
  });
  $("search").addEventListener("change", search);
  $("reset").addEventListener("click", () => {
    state.query = $("search").value = state.operation = $("operation").value = "";
    state.kinds.clear();
    for (const chip of $("chips").querySelectorAll("button")) chip.setAttribute("aria-pressed", "false");
    update();
    $("search").focus();
  });
}

function listen() {
  const canvas = $("canvas");
  const rowAt = (event) => event.target.closest?.(".row")?.row;
  canvas.addEventListener("click", (event) => {
    const row = rowAt(event);
    if (event.target.ribbon) return selectRibbon(event.target.ribbon);
    if (!row) return undefined;
    active[row.side.name] = row.id;
    markActive();
    const { unfold: run, fold } = event.target.dataset;
    if (run) return unfold(row, run);
    if (fold) return foldAgain(row);
    if (event.target.classList.contains("twist") && !row.tensor) return toggle(row, !row.open);
    if (row.open) return toggle(row, false);
    return selectRow(row);
  });
  canvas.addEventListener("dblclick", (event) => {
    const row = rowAt(event);
    if (row && !row.tensor && !event.target.dataset.unfold && !event.target.classList.contains("twist")) toggle(row, !row.open);
  });
  canvas.addEventListener("pointerover", (event) => {
    const row = rowAt(event);
    under = event.target.ribbon ? { ribbon: event.target.ribbon } : row ? { row } : null;
    lightUp();
  });
  canvas.addEventListener("pointerleave", () => {
    under = null;
    lightUp();
  });
  for (const name of ["source", "target"]) {
    $(name).addEventListener("keydown", (event) => walk(name, event));
    $(name).addEventListener("focus", () => {
      if (!activeRow(name) && layout.rows[name].length) {
        active[name] = layout.rows[name][0].id;
        markActive();
      }
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && event.target !== $("search") && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      $("search").focus();
      $("search").select();
    } else if (event.key === "Escape" && state.selected) {
      closePanel();
    }
  });
  window.addEventListener("scroll", drawSoon, { passive: true });
  new ResizeObserver(drawSoon).observe(canvas);
  window.addEventListener("resize", drawSoon);
  const print = (on) => () => {
    document.documentElement.classList.toggle("printing", on && layout.height < 60000);
    draw();
  };
  window.addEventListener("beforeprint", print(true));
  window.addEventListener("afterprint", print(false));
}

function walk(name, event) {
  const rows = layout.rows[name];
  const row = activeRow(name) ?? rows[0];
  if (!row || event.ctrlKey || event.metaKey || event.altKey) return;
  const page = Math.max(1, Math.floor(window.innerHeight / ROW / 2));
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -rows.length, End: rows.length };
  if (event.key in steps) {
    moveTo(name, rows[Math.min(rows.length - 1, Math.max(0, row.index + steps[event.key]))]);
  } else if (event.key === "ArrowRight") {
    if (!row.tensor && !row.open) toggle(row, true);
    else if (row.open) moveTo(name, rows[row.index + 1]);
  } else if (event.key === "ArrowLeft") {
    if (row.open) toggle(row, false);
    else moveTo(name, rows.slice(0, row.index).reverse().find((one) => one.level < row.level));
  } else if (event.key === "Enter" || event.key === " ") {
    selectRow(row);
    $("panel").focus({ preventScroll: true });
  } else if (event.key === "*" || event.key === "+") {
    if (row.runs) unfold(row, row.runs[0]);
  } else if (event.key === "-") {
    if (row.from) foldAgain(row);
  } else {
    return;
  }
  event.preventDefault();
}

$("main").hidden = false;
applyFilters();
chooseDetail();
makeChips();
makeTools();
listen();
update();
document.documentElement.dataset.ready = "true";
