// Two images of equal size, side by side or one over the other behind a divider; they are zoomed and moved together.
const MAX_ZOOM = 32;
const SMALL_PX = 128;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

export default {
  template: `
    <div class="zt-zoom" @keydown="key">
      <div class="zt-zoom-stage" :class="isSplit ? 'zt-zoom-split' : 'zt-zoom-sides'" :style="stage" tabindex="0" data-autofocus role="group"
           :aria-label="texts.hint" @wheel.prevent="wheel" @pointerdown="press" @pointermove="drag" @pointerup="release"
           @pointercancel="release" @dblclick="reset">
        <figure v-for="(pane, index) in panes" :key="index" class="zt-zoom-pane" :style="index && isSplit ? cut : ''">
          <img :src="pane.src" :alt="pane.label" :style="transform" :class="{'zt-zoom-small': isSmall}" draggable="false"
               @load="measure">
          <figcaption>{{ pane.label }}</figcaption>
        </figure>
        <div v-if="isSplit" class="zt-zoom-line" :style="{left: 100 * at + '%'}"></div>
      </div>
      <div class="zt-zoom-bar">
        <q-btn v-for="button in buttons" :key="button.icon" flat round dense color="link" :icon="button.icon"
               :aria-label="button.text" @click="button.act" />
        <q-btn flat dense no-caps color="link" icon="compare" :label="isSplit ? texts.sides : texts.split"
               v-if="panes.length > 1" @click="isSplit = !isSplit" />
        <span class="zt-quiet">{{ texts.hint }}</span>
      </div>
    </div>
  `,
  props: {
    panes: Array,
    texts: Object,
  },
  emits: ["step"],
  data: () => ({ x: 0, y: 0, zoom: 1, at: 0.5, shape: 1, isSmall: false, held: null, fingers: new Map(),
    prefersSplit: innerWidth < 700 }),
  computed: {
    isSplit: {
      get() { return this.prefersSplit && this.panes.length > 1; },
      set(value) { this.prefersSplit = value; },
    },
    buttons() {
      return [
        { icon: "chevron_left", text: this.texts.earlier, act: () => this.$emit("step", -1) },
        { icon: "zoom_out", text: this.texts.out, act: () => this.zoomAt(0.5, 0.5, 0.8) },
        { icon: "zoom_in", text: this.texts.in, act: () => this.zoomAt(0.5, 0.5, 1.25) },
        { icon: "chevron_right", text: this.texts.later, act: () => this.$emit("step", 1) },
      ];
    },
    stage() {
      const columns = this.isSplit ? 1 : this.panes.length;
      return { "--shape": this.shape, "--columns": columns };
    },
    transform() {
      return { transform: `translate(${100 * this.x}%, ${100 * this.y}%) scale(${this.zoom})` };
    },
    cut() {
      return { clipPath: `inset(0 0 0 ${100 * this.at}%)` };
    },
  },
  methods: {
    measure(event) {
      this.shape = event.target.naturalWidth / event.target.naturalHeight;
      this.isSmall = event.target.naturalWidth <= SMALL_PX;
    },
    // Offsets are in widths and heights of a pane, so that both images move alike.
    move(x, y) {
      this.x = clamp(x, 1 - this.zoom, 0);
      this.y = clamp(y, 1 - this.zoom, 0);
    },
    zoomAt(px, py, factor) {
      const before = this.zoom;
      this.zoom = clamp(before * factor, 1, MAX_ZOOM);
      this.move(px - (px - this.x) * this.zoom / before, py - (py - this.y) * this.zoom / before);
    },
    wheel(event) {
      const pane = event.target.closest(".zt-zoom-pane") || this.$el.querySelector(".zt-zoom-pane");
      const box = pane.getBoundingClientRect();
      const factor = Math.exp(-event.deltaY / 400);
      this.zoomAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, factor);
    },
    // The middle of two fingers and their distance.
    pinch() {
      const [a, b] = [...this.fingers.values()];
      return { x: (a.clientX + b.clientX) / 2, y: (a.clientY + b.clientY) / 2,
        apart: Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) };
    },
    press(event) {
      this.fingers.set(event.pointerId, event);
      if (this.fingers.size === 2) {
        this.held = { pinch: this.pinch() };
        return;
      }
      const box = this.$el.querySelector(".zt-zoom-pane").getBoundingClientRect();
      const place = (event.clientX - box.left) / box.width;
      const isLine = this.isSplit && (this.zoom === 1 || Math.abs(place - this.at) * box.width < 24);
      this.held = { isLine, box, clientX: event.clientX, clientY: event.clientY, x: this.x, y: this.y };
      event.currentTarget.setPointerCapture(event.pointerId);
      if (isLine) this.at = clamp(place, 0, 1);
    },
    drag(event) {
      const held = this.held;
      if (!held) return;
      this.fingers.set(event.pointerId, event);
      if (held.pinch) {
        const box = this.$el.querySelector(".zt-zoom-pane").getBoundingClientRect(), now = this.pinch();
        this.zoomAt((now.x - box.left) / box.width, (now.y - box.top) / box.height, now.apart / held.pinch.apart);
        held.pinch = now;
        return;
      }
      if (held.isLine) this.at = clamp((event.clientX - held.box.left) / held.box.width, 0, 1);
      else this.move(
        held.x + (event.clientX - held.clientX) / held.box.width,
        held.y + (event.clientY - held.clientY) / held.box.height,
      );
    },
    release(event) {
      this.fingers.delete(event.pointerId);
      this.held = null;
    },
    reset() {
      this.zoom = 1;
      this.move(0, 0);
    },
    key(event) {
      if (event.key === "+" || event.key === "=") this.zoomAt(0.5, 0.5, 1.25);
      else if (event.key === "-") this.zoomAt(0.5, 0.5, 0.8);
      else if (event.key === "0") this.reset();
      else return;
      event.preventDefault();
    },
  },
};
