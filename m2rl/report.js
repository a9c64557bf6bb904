// Values under the pointer, series that can be hidden, figures that can be saved. Without it the page reads the same.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = document.getElementById("tip");

  for (const title of all("figure svg title")) { // the browser's own slow tooltips become ours
    title.parentNode.setAttribute("data-tip", title.textContent);
    title.remove();
  }
  const show = (event) => {
    const mark = event.target.closest?.("[data-tip]");
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.getAttribute("data-tip");
    const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const y = event.clientY - tip.offsetHeight - 12;
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${y < 8 ? event.clientY + 18 : y}px`;
  };
  addEventListener("pointermove", show);
  addEventListener("pointerdown", show);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  for (const button of all(".legend button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      for (const group of all("g[data-s]", button.closest("figure")))
        if (group.dataset.s === button.dataset.s) group.classList.toggle("off", !on);
    });
  }

  const source = (svg) => { // a standalone document of the drawing as it is now shown
    const copy = svg.cloneNode(true), style = document.createElementNS(svg.namespaceURI, "style");
    copy.setAttribute("xmlns", svg.namespaceURI);
    style.textContent = document.getElementById("figure-style").textContent;
    copy.prepend(style);
    return new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
  };
  const save = (blob, name) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  for (const figure of all("figure[data-name]")) {
    const drawn = () => all("svg", figure).find((svg) => svg.getBoundingClientRect().width > 0);
    const picture = () => {
      const svg = drawn(), image = new Image(), address = URL.createObjectURL(source(svg));
      image.onload = () => {
        const canvas = document.createElement("canvas"), box = svg.viewBox.baseVal;
        [canvas.width, canvas.height] = [3 * box.width, 3 * box.height];
        canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
        URL.revokeObjectURL(address);
        canvas.toBlob((blob) => save(blob, `${figure.dataset.name}.png`));
      };
      image.src = address;
    };
    for (const [label, act] of [["SVG", () => save(source(drawn()), `${figure.dataset.name}.svg`)], ["PNG", picture]]) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: label });
      button.setAttribute("aria-label", `Save the figure as ${label}`);
      button.addEventListener("click", act);
      figure.querySelector(".tools").append(button);
    }
  }
  const contents = document.querySelector("nav details");
  if (innerWidth < 1120) contents.open = false;
})();
