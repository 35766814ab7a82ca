"""A star on each picture of the history, which gradio's gallery has no place for."""

# What a caption begins with if the picture is a favourite.
STAR = "★ "

# A click puts the name of the picture's folder into the hidden box `#star`.
SCRIPT = """() => {
  const press = (item) => {
    const box = document.querySelector('#star textarea, #star input');
    box.value = item.querySelector('img').src.split('/').at(-2);
    box.dispatchEvent(new Event('input', {bubbles: true}));
  };
  const added = (item) => {
    const star = document.createElement('button');
    star.type = 'button';
    star.className = 'star';
    star.addEventListener('click', () => press(item));
    item.append(star);
    return star;
  };
  const dress = () => document.querySelectorAll('#made .gallery-item').forEach((item) => {
    const star = item.querySelector('.star') ?? added(item);
    const on = (item.querySelector('.caption-label')?.textContent ?? '').trim().startsWith('★');
    if (star.getAttribute('aria-pressed') === String(on)) return;
    star.setAttribute('aria-pressed', on);
    star.setAttribute('aria-label', 'Favourite');
    star.title = on ? 'A favourite: it is kept' : 'Make it a favourite: it is kept';
    star.textContent = on ? '★' : '☆';
  });
  new MutationObserver(dress).observe(document.body, {childList: true, subtree: true, characterData: true});
  dress();
}"""
