"""Keyboard and drag-and-drop, which gradio has no events for."""

SCRIPT = """() => {
  const visible = (id) => {
    const button = document.querySelector(id);
    return button && button.offsetParent && !button.disabled ? button : null;
  };
  const press = (ids) => ids.map(visible).find((button) => button)?.click();
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.stopPropagation();
      document.activeElement?.dispatchEvent(new Event('change', {bubbles: true}));
      setTimeout(() => press(['#generate', '#compare', '#grid', '#load']), 50);
    } else if (event.key === 'Escape') {
      press(['#stop', '#compare-stop', '#grid-stop', '#explore-cancel', '#cancel']);
    }
  }, true);
  const holdsFile = (event) => [...(event.dataTransfer?.types ?? [])].includes('Files');
  const shade = (on) => document.body.classList.toggle('dropping', on);
  document.addEventListener('dragover', (event) => {
    if (holdsFile(event)) { event.preventDefault(); shade(true); }
  });
  document.addEventListener('dragleave', (event) => { if (!event.relatedTarget) shade(false); });
  document.addEventListener('drop', (event) => {
    shade(false);
    if (!holdsFile(event) || !event.dataTransfer.files.length) return;
    event.preventDefault();
    event.stopPropagation();
    const input = document.querySelector('#with-picture input[type=file]');
    if (!input) return;
    const files = new DataTransfer();
    files.items.add(event.dataTransfer.files[0]);
    input.files = files.files;
    input.dispatchEvent(new Event('change', {bubbles: true}));
  }, true);
}"""
