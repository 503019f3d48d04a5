// The cards of the grid of images. A card stays the same element while others change, so that text that is being typed
// is kept; only a caption that has changed itself gets a new field.
export default {
  template: `
    <div class="zt-images">
      <div v-for="row in rows" :key="row.name" class="zt-image" :data-name="row.name">
        <div class="zt-image-box" role="button" tabindex="0" :aria-label="texts.zoom + ' ' + row.name"
             @click="$emit('zoom', row.name)" @keydown.enter="$emit('zoom', row.name)">
          <div class="zt-image-frame" :style="row.frame">
            <img v-if="row.src" :src="row.src" loading="lazy" decoding="async" :alt="row.name">
            <img v-if="row.mask" :src="row.mask" loading="lazy" alt="">
            <div v-if="row.crop" class="zt-image-crop" :style="row.crop"></div>
          </div>
          <q-icon v-if="!row.src" name="broken_image" size="48px" class="zt-quiet" aria-hidden="true" />
        </div>
        <div class="zt-image-line">
          <span class="zt-image-name" :title="row.name">{{ row.name }}</span>
          <q-btn flat round dense size="sm" icon="auto_awesome" :aria-label="texts.describe + ' ' + row.name"
                 @click="$emit('describe', row.name)"><q-tooltip>{{ texts.describe }}</q-tooltip></q-btn>
          <q-btn flat round dense size="sm" icon="drive_file_move" :aria-label="texts.move + ' ' + row.name"
                 @click="$emit('move', row.name)"><q-tooltip>{{ texts.move }}</q-tooltip></q-btn>
        </div>
        <div class="zt-image-line zt-quiet">{{ row.facts }}</div>
        <q-linear-progress v-if="row.is_busy" indeterminate :aria-label="texts.describe" />
        <textarea class="zt-caption" rows="3" maxlength="20000" :key="row.key" :placeholder="texts.no_caption"
                  :aria-label="texts.caption + ' ' + row.name" @keydown.esc="reset($event, row)"
                  @keydown.ctrl.enter="$event.target.blur()" @change="save($event, row)">{{ row.caption }}</textarea>
        <div v-if="row.has_conflict" class="zt-conflict" role="alert">
          {{ texts.conflict }} <q>{{ row.conflict }}</q><br>
          <button type="button" @click="$emit('theirs', row.name)">{{ texts.theirs }}</button>
          <button type="button" @click="$emit('mine', row.name)">{{ texts.mine }}</button>
        </div>
      </div>
      <div v-if="is_read && !rows.length" class="zt-quiet">{{ texts.none }}</div>
    </div>
  `,
  props: {
    rows: Array,
    texts: Object,
    is_read: Boolean,
  },
  emits: ["zoom", "describe", "move", "save", "theirs", "mine"],
  methods: {
    save(event, row) {
      this.$emit("save", { name: row.name, text: event.target.value, expected: row.caption });
    },
    reset(event, row) {
      event.target.value = row.caption;
      event.target.blur();
    },
  },
};
