// Scrolling over more rows than a browser can lay out (Chromium ends at 33 million pixels, Firefox at 18).
import { useEffect, useLayoutEffect, useRef, useState } from "./preact-htm.js";

const MOST = 8e6; // pixels the scrolled element is made
const EXACT = 1e6; // at either end a pixel scrolled is a pixel of rows; between them the thumb stands for more

// Where the scroll bar stands when the rows are scrolled to `top`, of rows `height` pixels high; and back.
export function toBar(top, height) {
  if (height <= MOST || top <= EXACT) return top;
  if (top >= height - EXACT) return MOST - (height - top);
  return EXACT + ((top - EXACT) * (MOST - 2 * EXACT)) / (height - 2 * EXACT);
}

export function toRows(bar, height) {
  if (height <= MOST || bar <= EXACT) return bar;
  if (bar >= MOST - EXACT) return height - (MOST - bar);
  return EXACT + ((bar - EXACT) * (height - 2 * EXACT)) / (MOST - 2 * EXACT);
}

// {box, top, shift, view, width, height, moveTo}, of rows heightAt(width) pixels high: `top` of the rows, in pixels, at the upper edge of what is seen;
// what lies at y is drawn at y - shift. Wheel and keys move the rows pixel by pixel, the thumb moves them by its share,
// and when the hand rests, the thumb is put where it belongs.
export function useScroll(heightAt, onRest) {
  const box = useRef(null);
  const now = useRef({ top: 0, shift: 0, bar: 0, rest: 0 }).current;
  const [seen, see] = useState({ top: 0, shift: 0, view: 0, width: 0 });
  const height = heightAt(seen.width);
  const heightNow = useRef(height);
  heightNow.current = height;
  const rested = useRef(onRest);
  rested.current = onRest;

  const show = () =>
    see({ top: now.top, shift: now.shift, view: box.current.clientHeight, width: box.current.clientWidth });

  function moveTo(top) {
    now.top = Math.max(0, Math.min(top, heightNow.current - box.current.clientHeight));
    box.current.scrollTop = toBar(now.top, heightNow.current);
    now.bar = box.current.scrollTop;
    now.shift = now.top - now.bar;
    show();
  }

  useLayoutEffect(() => {
    const element = box.current;
    function scrolled() {
      const bar = element.scrollTop;
      if (Math.abs(bar - now.bar) > 3 * element.clientHeight) now.shift = toRows(bar, heightNow.current) - bar;
      now.top = Math.max(0, Math.min(bar + now.shift, heightNow.current - element.clientHeight));
      now.bar = bar;
      show();
      clearTimeout(now.rest);
      now.rest = setTimeout(() => {
        if (Math.abs(toBar(now.top, heightNow.current) - now.bar) > 1) moveTo(now.top);
        rested.current?.(now.top);
      }, 160);
    }
    element.addEventListener("scroll", scrolled, { passive: true });
    const resized = new ResizeObserver(show);
    resized.observe(element);
    show();
    return () => {
      clearTimeout(now.rest);
      element.removeEventListener("scroll", scrolled);
      resized.disconnect();
    };
  }, []);
  useEffect(() => {
    if (now.top > height - (box.current?.clientHeight ?? 0)) moveTo(now.top);
  }, [height]);
  return { box, ...seen, height: Math.min(height, MOST), moveTo };
}
