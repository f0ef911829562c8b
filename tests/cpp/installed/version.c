#include <stdio.h>

#include "titans/titans.h"

int main(void) {
  puts(titans_version());
  return 0;
}
