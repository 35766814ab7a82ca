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
    } else if (event.key === 'Escape' && event.target.getAttribute?.('aria-expanded') !== 'true') {
      press(['#stop', '#compare-stop', '#grid-stop', '#explore-cancel', '#cancel']);
    }
  }, true);
  window.addEventListener('hashchange', () => location.reload());  // a link that is pasted into an open page
  const shown = localStorage.getItem('textcond-shade');
  if (shown) document.body.classList.toggle('dark', shown === 'dark');
  document.querySelector('#shade')?.addEventListener('click', () => {
    const dark = document.body.classList.toggle('dark');
    localStorage.setItem('textcond-shade', dark ? 'dark' : 'light');
  });
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
    document.querySelector('#tabs button[role=tab]')?.click();
    const input = document.querySelector('#with-picture input[type=file]');
    if (!input) return;
    const files = new DataTransfer();
    files.items.add(event.dataTransfer.files[0]);
    input.files = files.files;
    input.dispatchEvent(new Event('change', {bubbles: true}));
  }, true);
}"""
