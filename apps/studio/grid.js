// Body of the function that gradio calls with (element, trigger, props, server, upload, watch) for a grid of pictures.
// `props.value` is empty, or the labels of its columns and rows and the files of its cells, row by row, null where a
// cell is not drawn yet. A click on a cell triggers `select` with its number.

const FILES = `${window.gradio_config?.root ?? ''}${window.gradio_config?.api_prefix ?? ''}/file=`;

const make = (tag, text, inside = []) => {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...inside);
  return made;
};

const head = (label, scope) => {
  const made = make('th', label);
  made.scope = scope;
  made.dir = 'auto';
  return made;
};

const cell = (path, number, label) => {
  const button = make('button', '');
  button.type = 'button';
  button.disabled = !path;
  button.dataset.cell = number;
  button.title = `${label}: use these settings`;
  if (path) {
    const image = document.createElement('img');
    image.src = FILES + path;
    image.alt = label;
    button.append(image);
  }
  return make('td', '', [button]);
};

const show = () => {
  const { columns, rows, cells } = props.value || {};
  if (!cells) return element.querySelector('.cells').replaceChildren();
  const labelled = rows.some((label) => label);
  const body = rows.map((label, row) => make('tr', '', [
    ...(labelled ? [head(label, 'row')] : []),
    ...columns.map((name, column) => {
      const number = row * columns.length + column;
      return cell(cells[number], number, [label, name].filter((one) => one).join(', '));
    }),
  ]));
  const top = make('tr', '', [...(labelled ? [make('td', '')] : []), ...columns.map((name) => head(name, 'col'))]);
  const table = make('table', '', [...(columns.some((name) => name) ? [top] : []), ...body]);
  element.querySelector('.cells').replaceChildren(table);
};

element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-cell]');
  if (button && !button.disabled) trigger('select', { index: Number(button.dataset.cell), value: null });
});
watch('value', show);
show();
