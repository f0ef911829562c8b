# Compile options. titans_compile(TARGET) applies the warnings to one of our targets.
set(titans_warnings -Wall -Wextra -Wpedantic -Wconversion)
if(TITANS_WARNINGS_AS_ERRORS)
  list(APPEND titans_warnings -Werror)
endif()

if(TITANS_SANITIZE)
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=address,undefined)
endif()

if(TITANS_SANITIZE_THREADS)
  add_compile_options(-fsanitize=thread -fno-omit-frame-pointer)
  add_link_options(-fsanitize=thread)
endif()

if(TITANS_FUZZ)
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()

function(titans_compile target)
  target_compile_options(${target} PRIVATE ${titans_warnings})
endfunction()
