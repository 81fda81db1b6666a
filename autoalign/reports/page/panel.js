// The evidence of what was clicked: its matches, each with its operation, cues, alternatives or choice, and warnings.

const CUES = {
  name: "how alike the names are", shape: "how well the shapes fit", structure: "what matched tensors nearby say of the modules",
  pattern: "what the same names elsewhere are matched with", order: "whether the neighbours are matched with each other",
  place: "the same place in a list of blocks", rule: "a rule that was given",
};
const VERDICTS = {
  matched: DIFF ? "compared" : "loaded", adapted: `${DIFF ? "compared" : "loaded"}, with changed values`,
  ambiguous: `not ${DIFF ? "compared" : "loaded"}: nothing says clearly that it is right`,
  mismatched: `not ${DIFF ? "compared" : "loaded"}: no operation reconciles the shapes`,
};
const LISTED = 60;
const CHOICE_ROW = 22; // pixels
const DRAWN = 8; // rows of a choice
const percent = (value) => value.toFixed(2);

function select(selection) {
  state.selected = selection;
  showPanel();
  for (const name of ["source", "target"]) {
    for (const [k, node] of drawn[name]) {
      const selected = isSelected(layout.rows[name][k]);
      node.classList.toggle("selected", selected);
      node.setAttribute("aria-selected", String(selected));
    }
  }
  lightUp();
}

// Group what was selected by what stands for it in the folded trees.
function groupsOf(selection) {
  const groups = new Map();
  const add = (key, make, item) => {
    if (!groups.has(key)) groups.set(key, make());
    groups.get(key).items.push(item);
  };
  for (const link of selection.links) {
    const side = sides.target;
    const shown = side.shown[side.nodeOf[links.target[link]]];
    add(`${shown} ${data.statuses[links.status[link]]}`, () => ({ type: "link", items: [] }), link);
  }
  for (const leaf of selection.loose) {
    const side = selection.row.side;
    add(`left ${side.shown[side.nodeOf[leaf]]}`, () => ({ type: "loose", side, items: [] }), leaf);
  }
  return [...groups.values()];
}

function selectRow(row) {
  select({ row, links: [...linksBelow(row)], loose: looseBelow(row) });
}

function selectRibbon(ribbon) {
  select({ ribbon, row: layout.rows.target[ribbon.target], links: ribbon.links, loose: [] });
}

function showPanel() {
  const panel = $("panel");
  panel.hidden = !state.selected;
  document.body.classList.toggle("with-panel", Boolean(state.selected));
  if (!state.selected) {
    panel.replaceChildren();
    return;
  }
  const groups = groupsOf(state.selected);
  const chosen = Math.max(0, groups.findIndex((group) => group.type === "link" && kindOf[group.items[0]] === "ambiguous"));
  const head = el("div", { class: "panel-head" },
    el("h2", {}, "Evidence"),
    el("button", { type: "button", class: "close", "aria-label": "Close the evidence", onclick: closePanel }, "✕"));
  const detail = el("div", { class: "detail" });
  const parts = [head];
  if (groups.length > 1) {
    const list = el("ul", { class: "groups", "aria-label": "Matches of the selection" });
    const show = (upTo) => {
      list.replaceChildren(...groups.slice(0, upTo).map((group, k) => el("li", {}, groupButton(group, k, list, detail))));
      if (groups.length > upTo) {
        list.append(el("li", {}, el("button", { type: "button", class: "more", onclick: () => show(upTo * 4) },
          `${(groups.length - upTo).toLocaleString("en")} more`)));
      }
    };
    show(Math.max(LISTED, chosen + 1));
    list.querySelectorAll("button")[chosen].setAttribute("aria-current", "true");
    parts.push(list);
  }
  parts.push(detail);
  panel.replaceChildren(...parts);
  panel.scrollTop = 0;
  showGroup(groups[chosen], 0, detail);
  drawSoon();
}

function closePanel() {
  const side = state.selected?.row?.side.name;
  select(null);
  if (side) $(side).focus({ preventScroll: true });
  drawSoon();
}

function groupButton(group, k, list, detail) {
  const several = group.items.length > 1 ? el("span", { class: "count" }, `×${group.items.length.toLocaleString("en")}`) : "";
  const kind = group.type === "link" ? worstOf(group.items) : group.side.name === "target" ? "missing" : "unexpected";
  const button = el("button", { type: "button" }, el("span", { class: `dot k-${kind}` }), titleOf(group), several);
  button.addEventListener("click", () => {
    for (const one of list.querySelectorAll("[aria-current]")) one.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    showGroup(group, 0, detail);
  });
  return button;
}

const worstOf = (found) => found.reduce((worst, link) => (rank(kindOf[link]) > rank(worst) ? kindOf[link] : worst), kindOf[found[0]]);
const titleOf = (group) => el("span", { class: "key" },
  group.type === "link" ? joinKeys(sides.target, group.items.map((link) => links.target[link])) : joinKeys(group.side, group.items));

function showGroup(group, index, detail) {
  if (!group) {
    detail.replaceChildren(el("p", {}, "Nothing here is joined with the other side."));
    return;
  }
  const parts = group.type === "link" ? matchParts(group.items[index]) : looseParts(group, index);
  if (group.items.length > 1) parts.unshift(steps(group, index, detail));
  detail.replaceChildren(...parts);
}

function steps(group, index, detail) {
  const count = group.items.length;
  const go = (to) => () => {
    showGroup(group, (to + count) % count, detail);
    detail.querySelector(to > index ? ".next" : ".previous").focus();
  };
  const all = group.items.map((link) => links.confidence[link]);
  const [least, most] = all.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [1, 0]);
  const range = group.type === "link" ? `, confidence ${percent(least)}${most > least ? ` to ${percent(most)}` : ""}` : "";
  return el("div", { class: "steps" },
    el("button", { type: "button", class: "previous", "aria-label": "Previous", onclick: go(index - 1) }, "‹"),
    el("span", {}, `${(index + 1).toLocaleString("en")} of ${count.toLocaleString("en")}${range}`),
    el("button", { type: "button", class: "next", "aria-label": "Next", onclick: go(index + 1) }, "›"));
}

function tensorLine(side, leaf, role) {
  return el("div", { class: `tensor-line ${role}` },
    el("span", { class: "key" }, keyOf(side, leaf)),
    el("span", { class: "what" }, `${shapeText(side, leaf)} ${data.dtypes[side.dtype[leaf]]}`));
}

function tensorList(side, leaves, role) {
  const box = el("div", { class: "tensors" });
  const show = (upTo) => {
    box.replaceChildren(...leaves.slice(0, upTo).map((leaf) => tensorLine(side, leaf, role)));
    if (leaves.length > upTo) {
      box.append(el("button", { type: "button", class: "more", onclick: () => show(leaves.length) },
        `${(leaves.length - upTo).toLocaleString("en")} more`));
    }
  };
  show(leaves.length > 14 ? 12 : 14);
  return box;
}

function matchParts(link) {
  const status = data.statuses[links.status[link]];
  const kind = kindOf[link];
  const [source, target] = [sides.source, sides.target];
  const confidence = links.confidence[link];
  const parts = [el("p", { class: `verdict k-${kind}` }, el("span", { class: `dot k-${kind}` }), VERDICTS[status])];
  for (const text of links.warnings[link] || []) parts.push(el("p", { class: "warning" }, `⚠ ${data.texts[text]}`));
  if (links.choice[link] >= 0) parts.push(el("h3", {}, "To choose"), choiceList(data.choices[links.choice[link]]));
  parts.push(el("h3", {}, links.sources[link].length > 1 ? `${links.sources[link].length} source tensors` : "Source tensor"));
  parts.push(tensorList(source, links.sources[link], "source"));
  const operation = data.operations[links.operation[link]][0];
  parts.push(el("div", { class: "operation" }, status === "mismatched" ? `≠ ${differing(link)}` : `↓ ${operation}`));
  parts.push(el("h3", {}, "Target tensor"), tensorList(target, [links.target[link]], "target"));
  if (status === "mismatched") return parts;
  if (DIFF && links.change[link]) {
    const [, mean, largest] = links.change[link];
    parts.push(el("h3", {}, "Change"), el("p", { class: "change" }, `mean ${mean}, largest ${largest}`));
  }
  parts.push(el("h3", {}, "Confidence"), meter(confidence, `k-${kind}`, percent(confidence), "Confidence"));
  const cues = Object.entries(data.evidence[links.evidence[link]]);
  if (cues.length) {
    parts.push(el("h3", {}, "Cues"), el("dl", { class: "cues" }, ...cues.flatMap(([cue, value]) => [
      el("dt", {}, cue, CUES[cue] ? el("small", {}, CUES[cue]) : ""),
      el("dd", {}, meter(value, "", value.toFixed(3).replace(/0$/, ""), cue)),
    ])));
  }
  if (links.choice[link] >= 0) return parts;
  if (links.alternatives[link]) {
    parts.push(el("h3", {}, "Alternatives, best first"), el("ol", { class: "alternatives" },
      ...links.alternatives[link].map(([sources, other]) => el("li", {},
        tensorList(source, typeof sources === "number" ? [sources] : sources, "source"),
        el("div", { class: "operation" }, data.operations[other][0])))));
  } else {
    parts.push(el("p", { class: "none" }, "No alternative was close."));
  }
  return parts;
}

// The answers to a choice, each as ribbons from what it takes to what it fills, with the text that makes it.
function choiceList(choice) {
  const rows = { source: [], target: [] }; // in the order of the proposal, so that what another answer exchanges crosses
  const placeOf = (side, leaf) => {
    const node = side.shown[side.nodeOf[leaf]];
    const found = rows[side.name].find((row) => row.node === node);
    if (found) found.leaves.add(leaf);
    else rows[side.name].push({ node, leaves: new Set([leaf]) });
    return rows[side.name].findIndex((row) => row.node === node);
  };
  const pairs = choice.options.map((option) => new Set(option.pairs.flatMap(([sources, target]) =>
    sources.map((leaf) => `${placeOf(sides.source, leaf)} ${placeOf(sides.target, target)}`))));
  const labels = (name) => el("div", { class: "ends" }, ...rows[name].slice(0, DRAWN).map((row) =>
    el("span", { class: "key" }, joinKeys(sides[name], [...row.leaves]).split(".").slice(-3).join("."))));
  const drawing = (k) => {
    const high = CHOICE_ROW * Math.min(DRAWN, Math.max(rows.source.length, rows.target.length));
    const picture = svg("svg", { viewBox: `0 0 60 ${high}`, width: 60, height: high, "aria-hidden": "true" });
    const ends = (place) => [place * CHOICE_ROW + 4, place * CHOICE_ROW + CHOICE_ROW - 4];
    for (const [from, to] of [...pairs[k]].map((pair) => pair.split(" ").map(Number))) {
      if (Math.max(from, to) >= DRAWN) continue;
      picture.append(svg("path", { class: "ribbon k-ambiguous", d: ribbonPath({ from: ends(from), to: ends(to) }, 60, 0) }));
    }
    return el("div", { class: "crossing" }, labels("source"), picture, labels("target"));
  };
  return el("ul", { class: "choice" }, ...choice.options.map((option, k) => {
    const same = k > 0 && [...pairs[k]].join() === [...pairs[0]].join();
    const how = [k ? "or" : "as proposed", same ? `by ${option.operations.join(", ")}` : ""].filter(Boolean).join(", ");
    return el("li", {}, `${how}:`, same ? "" : drawing(k), el("div", { class: "paste" }, el("code", {}, option.paste), copyButton(option.paste)));
  }), ...choice.more.map((line) => el("li", {}, line)));
}

function copyButton(text) {
  const button = el("button", { type: "button", class: "more", "aria-label": `Copy ${text}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch { // where a page may not write there: the text is marked, to be copied with the keys
      getSelection().selectAllChildren(button.previousSibling);
    }
  });
  return button;
}

// In which dimensions the shapes of a mismatched pair differ.
function differing(link) {
  const has = data.shapes[sides.source.shape[links.sources[link][0]]];
  const needs = data.shapes[sides.target.shape[links.target[link]]];
  if (has.length !== needs.length) return "";
  return needs.flatMap((size, dim) => (size === has[dim] ? [] : [`dim ${dim}: ${has[dim]}, needs ${size}`])).join("; ");
}

function looseParts(group, index) {
  const { side, items } = group;
  const leaf = items[index];
  const row = side.left.get(leaf) ?? group.items.map((one) => side.left.get(one)).find((one) => one);
  const kind = side.name === "target" ? "missing" : "unexpected";
  if (!row) {
    return [tensorList(side, [leaf], side.name),
      el("p", {}, "Shares its storage with a tensor that is used.")];
  }
  const parts = [
    el("p", { class: `verdict k-${kind}` }, el("span", { class: `dot k-${kind}` }),
      DIFF ? "only in this one" : kind === "missing" ? "missing: in the model, and nothing fills it" : "unexpected: in the checkpoint, and not used"),
    tensorList(side, [leaf], side.name), el("h3", {}, "Reason"), el("p", { class: "reason" }, data.texts[row[1]]),
  ];
  const near = row.length > 2 ? row : side.left.get(firstOf(side, leaf));
  if (near?.length > 2) {
    const opposite = sides[other[side.name]];
    const several = near === row ? "" : " of the first of these";
    parts.push(el("h3", {}, `Nearest that is free${several}`), tensorList(opposite, [near[2]], opposite.name));
    if (data.texts[near[3]]) parts.push(el("p", {}, data.texts[near[3]]));
  }
  return parts;
}

const firstOf = (side, leaf) => side.leaves[side.shown[side.nodeOf[leaf]]];

function meter(value, kind, text, label) {
  const fill = el("span", { class: `fill ${kind}` });
  fill.style.width = `${Math.max(0, Math.min(1, value)) * 100}%`;
  return el("div", { class: "meter", role: "img", "aria-label": `${label} ${text} of 1` },
    el("span", { class: "track" }, fill), el("span", { class: "value" }, text));
}
